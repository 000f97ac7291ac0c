"""lm-eval's own task files asked of our copy of their questions, and what their scorers need.

A task file beside the prepared questions includes lm-eval's and says where the documents are; all
else (prompts, examples, filters, metrics) is lm-eval's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import yaml

from fusion.errors import RunError
from harness.store import write_text
from tasks.suite import DEFINITIONS, Suite

EXTRA = "ifeval"  # of pyproject.toml
PUNKT = "tokenizers/punkt_tab"  # where NLTK keeps what cuts text into sentences


def lay_out(suite: Suite, data: Path) -> Path:
    """The folder of a suite's questions, with the task file in it; RunError if a need is missing.

    ValueError if the suite has not one task.
    """
    missing = lacking(suite)
    if missing:
        raise RunError(f"suite {suite.name}: {missing}")
    (task,) = suite.tasks
    place = importlib.util.find_spec("lm_eval")
    roots = list(place.submodule_search_locations or []) if place else []
    stock = Path(roots[0] if roots else "lm_eval") / "tasks" / suite.stock
    if not stock.is_file():
        raise RunError(f"{stock}: no such file; it comes with lm-eval 0.4.13, install that")
    content = {
        "include": [str(stock), str(DEFINITIONS / "_stock.yaml")],
        "task": task.name,
        "dataset_kwargs": {"splits": dict(suite.splits)},
    }
    write_text(data / f"{suite.name}.yaml", yaml.safe_dump(content))
    return data


def lacking(suite: Suite) -> str:
    """What a suite's scorer needs and is not there, with what to do; empty if nothing is.

    The network is not asked: lm-eval would fetch NLTK's part by itself, in the middle of a run.
    """
    absent = [name for name in suite.needs if importlib.util.find_spec(name) is None]
    if absent:
        return f"its checks need {', '.join(absent)}: pip install -e '.[{EXTRA}]'"
    if "nltk" in suite.needs:
        import nltk

        try:
            nltk.data.find(PUNKT)
        except LookupError:
            return "its checks need NLTK's punkt_tab: python -m nltk.downloader punkt_tab"
    return ""


def check(suites: Iterable[Suite]) -> None:
    """RunError with all that these suites' scorers need and is not there."""
    found = {suite.name: what for suite in suites if (what := lacking(suite))}
    if found:
        raise RunError("\n".join(f"suite {name}: {what}" for name, what in found.items()))
