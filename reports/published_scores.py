"""Scores that others printed, as lines of a leaderboard that say where they are from.

A CSV table with the columns row, suite, score and source; fractions, or bits per byte. Optional:
metric, n, error (a standard error) and lower_is_better (yes or no). A printed number has no items
and its protocol is what its source says, so each source has columns of its own and no test.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

from reports.lm_eval_results import LOWER, Imported

NEEDED = ("row", "suite", "score", "source")
ALLOWED = (*NEEDED, "metric", "n", "error", "lower_is_better")
BITS = ("bits_per_byte",)


def read_scores(path: Path) -> list[Imported]:
    """The table's scores. ValueError names the line, what it has and what it should have."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            names = [name or "" for name in reader.fieldnames or ()]
            _check(path, names)
            found = [_line(path, reader.line_num, line) for line in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV table in UTF-8 ({error})") from error
    if not found:
        raise ValueError(f"{path}: no line under the head {', '.join(names)}; nothing to import")
    seen: set[tuple[str, str, str]] = set()
    for one in found:
        key = (one.model, one.task, one.origin)
        if key in seen:
            raise ValueError(f"{path}: {one.model} on {one.task} stands there twice, {one.origin}")
        seen.add(key)
    return found


def _check(path: Path, names: list[str]) -> None:
    missing = [name for name in NEEDED if name not in names]
    unknown = [name for name in names if name not in ALLOWED]
    if missing or unknown:
        what = f"no column {', '.join(missing)}" if missing else f"unknown column {unknown[0]!r}"
        raise ValueError(
            f"{path}: {what}; needed: {', '.join(NEEDED)}; allowed: {', '.join(ALLOWED)}"
        )


def _line(path: Path, number: int, line: dict[str, str | None]) -> Imported:
    where = f"{path}, line {number}"
    filled = {name: (line.get(name) or "").strip() for name in NEEDED}
    empty = [name for name, value in filled.items() if not value]
    if empty or None in line:
        what = f"no {empty[0]}" if empty else "more cells than the head has"
        raise ValueError(f"{where}: {what}")
    metric = (line.get("metric") or "").strip()
    bits = metric in LOWER or filled["suite"].partition("@")[0] in BITS
    score = _number(where, "score", filled["score"])
    if not bits and not 0 <= score <= 1:
        raise ValueError(f"{where}: score is {score:g}; a fraction is needed, 0.452 for 45.2 %")
    lower = (line.get("lower_is_better") or "").strip().lower()
    if lower not in ("", "yes", "no"):
        raise ValueError(f"{where}: lower_is_better is {lower!r}; yes or no")
    count, spread = ((line.get(name) or "").strip() for name in ("n", "error"))
    n = _number(where, "n", count) if count else None
    error = _number(where, "error", spread) if spread else None
    if n is not None and (n < 1 or n != int(n)):
        raise ValueError(f"{where}: n is {count}; a number of items from 1")
    if error is not None and error < 0:
        raise ValueError(f"{where}: error is {spread}; a standard error from 0")
    return Imported(
        model=filled["row"],
        task=filled["suite"],
        metric=metric or ("bits_per_byte" if bits else "score"),
        filter="",
        score=score,
        error=error,
        n=None if n is None else int(n),
        shots=None,
        version="",
        higher_is_better=lower == "no" or (lower == "" and not bits),
        origin=f"published: {filled['source']}",
    )


def _number(where: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: {name} is {text!r}, not a number")
    return value
