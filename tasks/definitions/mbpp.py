"""MBPP's prompt: a task and its tests behind three solved ones."""

from __future__ import annotations

import ast
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any


def behind_shots(dataset: Any) -> Any:
    """The same problems, with a whole prompt where the task's text was (`text` keeps it)."""
    from datasets import Dataset

    solved = shots()
    return Dataset.from_list(
        [
            {**row, "text": row["prompt"], "prompt": solved + question(row["prompt"], row["tests"])}
            for row in dataset
        ]
    )


def question(text: str, tests: list[str]) -> str:
    """How a task is put; a solution and [DONE] follow."""
    shown = "\n".join(tests[:3])
    return (
        f"You are an expert Python programmer, and here is your task: {text} "
        f"Your code should pass these tests:\n\n{shown}\n[BEGIN]\n"
    )


@lru_cache(maxsize=1)
def shots() -> str:
    """MBPP's tasks 2, 3 and 4 with solutions, from lm-eval's installed task file.

    The file is read and not imported, as importing it executes code. FileNotFoundError if it is not
    there, ValueError if it holds no `list_fewshot_samples`.
    """
    spec = importlib.util.find_spec("lm_eval")
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0] if places else "lm_eval") / "tasks/mbpp/utils.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it comes with lm-eval 0.4.13, install that")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
            returned = next(n.value for n in node.body if isinstance(n, ast.Return))
            samples = ast.literal_eval(returned) if returned else []
            return "".join(
                f"{question(s['text'], s['test_list'])}{s['code']}\n[DONE]\n\n" for s in samples
            )
    raise ValueError(f"{path}: no list_fewshot_samples in it; install lm-eval 0.4.13")
