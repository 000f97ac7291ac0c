"""Scores from a result file of lm-eval, as lines of a leaderboard that are marked as imported.

Such a file has scores and standard errors, no items: an imported line is never compared with
another one item by item, and its protocol is known as far as the file tells it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports.records import read_json

# As lm-eval 0.4 names the metric that its own task groups and the published tables use.
PREFERRED = ("acc_norm", "acc", "exact_match", "pass@1", "pass_at_1", "bits_per_byte")
LOWER = ("bits_per_byte", "word_perplexity", "byte_perplexity", "perplexity")


@dataclass(frozen=True)
class Imported:
    """One task of a result file."""

    model: str
    task: str
    metric: str
    filter: str
    score: float
    error: float | None  # standard error as lm-eval gives it; None where it says N/A
    n: int | None
    shots: int | None
    version: str
    higher_is_better: bool
    origin: str = "imported from lm-eval"


def read_results(path: Path) -> list[Imported]:
    """The tasks of a result file, one metric each. ValueError if it is none, or has no number."""
    content = read_json(path)
    results = content.get("results")
    if not isinstance(results, dict) or not results:
        raise ValueError(f"{path}: no 'results'; not a result file of lm-eval")
    model = str(content.get("model_name") or content.get("model_source") or path.stem)
    out = []
    for task, values in results.items():
        found = _metric(values) if isinstance(values, dict) else None
        if found is None:
            continue
        metric, name = found
        score = values[f"{metric},{name}"]
        out.append(
            Imported(
                model=model,
                task=str(task),
                metric=metric,
                filter=name,
                score=float(score),
                error=_number(values.get(f"{metric}_stderr,{name}")),
                n=_count(content, task),
                shots=(content.get("n-shot") or {}).get(task),
                version=str((content.get("versions") or {}).get(task, "?")),
                higher_is_better=metric not in LOWER,
            )
        )
    if not out:
        raise ValueError(
            f"{path}: no task has one of {', '.join(PREFERRED)} as a number; nothing to import"
        )
    return out


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None


def _metric(values: dict[str, Any]) -> tuple[str, str] | None:
    """The first preferred metric that has a finite number, with its filter."""
    for metric in PREFERRED:
        for key, value in values.items():
            name, comma, filter_name = str(key).partition(",")
            if comma and name == metric and _number(value) is not None:
                return metric, filter_name
    return None


def _count(content: dict[str, Any], task: str) -> int | None:
    sizes = (content.get("n-samples") or {}).get(task) or {}
    count = sizes.get("effective") if isinstance(sizes, dict) else None
    return int(count) if isinstance(count, int) else None
