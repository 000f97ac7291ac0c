"""What lm-eval calls for a task's documents: `custom_dataset` functions, named in the YAML files.

lm-eval loads this file by its path and passes a task's `metadata` and `dataset_kwargs` as keywords,
so every function takes what it does not use. No function touches the network.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import yaml

OWN = Path(__file__).parent / "tiny"
_ANSWER = re.compile(r"the answer is ([^\n]+?)\.?[ \t]*(?:\n|$)")


def questions(dataset: str, data_dir: str | None = None, **_: Any) -> dict[str, Any]:
    """The documents in `<data_dir>/<dataset>.jsonl`, as the split "test"; see `documents`."""
    return _split(documents(dataset, data_dir))


def category(dataset: str, category: str, data_dir: str | None = None, **_: Any) -> dict[str, Any]:
    """The documents of `questions` that are of one category."""
    return _split([d for d in documents(dataset, data_dir) if d["category"] == category])


def documents(dataset: str, data_dir: str | None = None) -> list[dict[str, Any]]:
    """The documents in `<data_dir>/<dataset>.jsonl`.

    data_dir comes from TaskManager(metadata={"data_dir": …}). FileNotFoundError if the file is not
    there.
    """
    if data_dir is None:
        raise FileNotFoundError(
            f"dataset '{dataset}': no data_dir given; construct lm-eval's TaskManager with "
            'metadata={"data_dir": FOLDER}, a folder that harness.assets.prepare_data made'
        )
    path = Path(data_dir) / f"{dataset}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; harness.assets.prepare_data writes it")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def exemplars(dataset: str, **_: Any) -> dict[str, Any]:
    """The three solved exemplars of a BBH task, each a question with the other two as shots.

    They are read from lm-eval's own installed task file. FileNotFoundError if it is not there.
    """
    return _split(exemplar_documents(dataset))


def exemplar_documents(task: str) -> list[dict[str, Any]]:
    """Documents of `exemplars` as plain dictionaries: prompt, gold, input, shots, id, cluster."""
    spec = importlib.util.find_spec("lm_eval")
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0] if places else "lm_eval") / "tasks/bbh/cot_fewshot" / f"{task}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it comes with lm-eval 0.4.13, install that")
    stock = yaml.safe_load(path.read_text(encoding="utf-8"))
    samples = stock["fewshot_config"]["samples"]
    documents = []
    for index, asked in enumerate(samples):
        shots = [s for other, s in enumerate(samples) if other != index]
        turns = [f"{_ask(stock, shot)}{shot['target']}\n\n" for shot in shots]
        answer = _ANSWER.search(asked["target"])
        if answer is None:
            raise ValueError(f"{path}: exemplar {index} does not say 'the answer is'")
        documents.append(
            {
                "id": f"{task}:{index}",
                "prompt": stock["description"] + "".join(turns) + _ask(stock, asked),
                "gold": answer[1],
                "input": asked["input"],
                "shots": [shot["input"] for shot in shots],
                "cluster": task,
            }
        )
    return documents


def own(dataset: str, **_: Any) -> dict[str, Any]:
    """kfuse's own few questions, from the YAML files beside this one."""
    path = OWN / f"{dataset}.yaml"
    return _split(yaml.safe_load(path.read_text(encoding="utf-8"))["documents"])


def _ask(stock: dict[str, Any], sample: dict[str, str]) -> str:
    return stock["doc_to_text"].replace("{{input}}", sample["input"])


def _split(documents: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(documents)}
