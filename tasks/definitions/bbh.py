"""BIG-Bench Hard's own questions, asked and read as open-instruct does: `bbh@fusellm`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import yaml

HUB = "SaylorTwift/bbh"  # where lm-eval's own tasks read it
_ANSWER = re.compile(r"[tT]he answer is (.*?)\.")


def questions(dataset: str, **_: Any) -> dict[str, Any]:
    """A task's questions behind its three solved exemplars, as the split "test".

    Questions come through `datasets`, from the hub or HF_DATASETS_CACHE.
    """
    from datasets import Dataset, load_dataset

    solved = exemplars(dataset)
    documents = [
        {
            "id": f"{dataset}:{number}",
            "prompt": f"{solved}\n\nQ: {row['input']}\nA:",
            "gold": row["target"],
            "input": row["input"],
        }
        for number, row in enumerate(load_dataset(HUB, dataset, split="test"))
    ]
    return {"test": Dataset.from_list(documents)}


def exemplars(task: str) -> str:
    """The official chain-of-thought prompt of a task, from lm-eval's installed task file.

    That file breaks one line in sports_understanding where the official prompt does not.
    """
    spec = importlib.util.find_spec("lm_eval")
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0] if places else "lm_eval") / "tasks/bbh/cot_fewshot" / f"{task}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it comes with lm-eval 0.4.13, install that")
    stock = yaml.safe_load(path.read_text(encoding="utf-8"))
    asked = stock["doc_to_text"]
    if task == "sports_understanding":
        asked = asked.removesuffix("\n") + " "
    samples = stock["fewshot_config"]["samples"]
    turns = [asked.replace("{{input}}", sample["input"]) + sample["target"] for sample in samples]
    return stock["description"] + "\n\n".join(turns)


def answers(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """What stands after "the answer is" up to the next full stop, else all that was said.

    An answer such as 3.5 is cut at its point: so it is in the published protocol.
    """
    found = [_ANSWER.search(said[0]) for said in resps]
    return [
        [(match[1] if match else said[0]).strip()] for match, said in zip(found, resps, strict=True)
    ]
