"""BIG-Bench Hard's own questions behind three solved exemplars, as two protocols ask them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tasks.definitions.data import documents

_ANSWER = re.compile(r"[tT]he answer is (.*?)\.")


def questions(dataset: str, data_dir: str | None = None, **_: Any) -> dict[str, Any]:
    """A task's questions as open-instruct asks them (`bbh@fusellm`), as the split "test".

    data_dir: a folder that harness.assets.prepare_data made.
    """
    solved = exemplars(dataset)
    return _ask(dataset, data_dir, lambda asked: f"{solved}\n\nQ: {asked}\nA:")


def stock_questions(dataset: str, data_dir: str | None = None, **_: Any) -> dict[str, Any]:
    """A task's questions as lm-eval's `bbh_cot_fewshot` asks them, as the split "test"."""
    stock = _stock(dataset)
    turns = _turns(stock, stock["doc_to_text"])
    head = stock["description"] + "".join(f"{turn}\n\n" for turn in turns)
    return _ask(
        dataset, data_dir, lambda asked: head + stock["doc_to_text"].replace("{{input}}", asked)
    )


def _ask(dataset: str, data_dir: str | None, prompt: Callable[[str], str]) -> dict[str, Any]:
    from datasets import Dataset

    asked = [
        {
            "id": f"{dataset}:{row['id']}",
            "prompt": prompt(row["input"]),
            "gold": row["gold"],
            "input": row["input"],
        }
        for row in documents(f"bbh_{dataset}", data_dir)
    ]
    return {"test": Dataset.from_list(asked)}


def exemplars(task: str) -> str:
    """The official chain-of-thought prompt of a task, from lm-eval's installed task file.

    That file breaks one line in sports_understanding where the official prompt does not.
    """
    stock = _stock(task)
    asked = stock["doc_to_text"]
    if task == "sports_understanding":
        asked = asked.removesuffix("\n") + " "
    return stock["description"] + "\n\n".join(_turns(stock, asked))


def _turns(stock: dict[str, Any], asked: str) -> list[str]:
    samples = stock["fewshot_config"]["samples"]
    return [asked.replace("{{input}}", sample["input"]) + sample["target"] for sample in samples]


def _stock(task: str) -> dict[str, Any]:
    spec = importlib.util.find_spec("lm_eval")
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0] if places else "lm_eval") / "tasks/bbh/cot_fewshot" / f"{task}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it comes with lm-eval 0.4.13, install that")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def answers(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """What stands after "the answer is" up to the next full stop, else all that was said.

    An answer such as 3.5 is cut at its point: so it is in the published protocol.
    """
    found = [_ANSWER.search(said[0]) for said in resps]
    return [
        [(match[1] if match else said[0]).strip()] for match, said in zip(found, resps, strict=True)
    ]
