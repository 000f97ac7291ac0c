"""Rows ranked suite by suite, with what the ranks are worth.

A column holds runs whose signatures differ in nothing but the model; another protocol is another
column. Ranks are bootstrapped over items drawn for all rows alike; groups join rows that no test
tells apart. Imported scores have columns of their own and no rank intervals: they have no items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.compare import NotComparable, opened, primary
from reports.lm_eval_results import LOWER, Imported, read_results
from reports.published_scores import read_scores
from reports.ranks import ranks
from reports.records import Run, apart, read_json
from reports.signature import differences

if TYPE_CHECKING:
    import pandas as pd

FORMULA = "(score − chance) / (1 − chance), macro over tasks; 0 is guessing, 1 is perfect"


@dataclass(frozen=True)
class Line:
    """One row in one column."""

    row: str
    score: float
    low: float | None
    high: float | None
    n: int
    rank: int
    rank_low: int | None  # 95 % of the bootstrap
    rank_high: int | None
    group: str  # letters; two rows that share one are not told apart
    normalised: float | None  # None where a task has no chance level
    source: str  # "measured", or "imported from lm-eval"


@dataclass(frozen=True)
class Board:
    """One suite under one protocol, best row first."""

    suite: str
    protocol: str
    unit: str
    higher_is_better: bool
    partial: str  # how much of the suite was measured, "" if all
    lines: tuple[Line, ...]
    note: str = ""


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], list[list[Imported]]]:
    """Runs and imported results that paths stand for.

    A path is a run's folder, a folder of runs, a report's folder or index, a result file of
    lm-eval (.json) or a table of published scores (.csv). NotComparable or FileNotFoundError say
    what cannot be read.
    """
    runs: dict[Path, Run] = {}
    imported = []
    for path in paths:
        if path.suffix == ".csv" and not path.is_dir():
            imported.append(opened(read_scores, path))
            continue
        if path.suffix == ".json" and path.name != "index.json" and not path.is_dir():
            imported.append(opened(read_results, path))
            continue
        index = path if path.is_file() else path / "index.json"
        if index.is_file():
            root = index.resolve().parent.parent.parent
            cells = opened(read_json, index).get("cells", {})
            found = [root / c["run"] for row in cells.values() for c in row.values() if "run" in c]
        elif (path / "manifest.json").is_file():
            found = [path]
        else:
            found = sorted(manifest.parent for manifest in path.glob("*/manifest.json"))
        if not found:
            raise FileNotFoundError(f"{path}: no finished run, report or lm-eval result is here")
        for folder in found:
            runs.setdefault(folder.resolve(), opened(Run.open, folder))
    return list(runs.values()), imported


def boards(runs: Sequence[Run], imported: Sequence[list[Imported]] = ()) -> list[Board]:
    """The columns, in the order in which their first run came."""
    columns: list[list[Run]] = []
    for run in [part for whole in runs for part in apart(whole)]:
        for column in columns:
            if not differences(run.manifest, column[0].manifest):
                column.append(run)
                break
        else:
            columns.append([run])
    measured = [_board(column) for column in columns]
    return [*measured, *_imported(imported)]


def row_names(runs: Sequence[Run]) -> list[str]:
    """Row names, told apart by the model's identity where two models have one name."""
    models: dict[str, set[str]] = {}
    for run in runs:
        models.setdefault(str(run.manifest["row"]), set()).add(str(run.manifest["model_identity"]))
    named = [(str(run.manifest["row"]), str(run.manifest["model_identity"])) for run in runs]
    return [row if len(models[row]) == 1 else f"{row}@{model[:8]}" for row, model in named]


def _board(column: list[Run]) -> Board:
    from reports.table import _cell, _column

    manifest = column[0].manifest
    frames = [primary(run) for run in column]
    _same_items(column, frames)
    kind = _column({"name": manifest["suite"], "title": manifest["suite"], **manifest})
    names = row_names(column)
    cells = [
        _cell(name, manifest["suite"], run, frame, "")
        for name, run, frame in zip(names, column, frames, strict=True)
    ]
    gaps = [f"{cell.row}: {cell.reason}" for cell in cells if cell.score is None]
    kept = [i for i, cell in enumerate(cells) if cell.score is not None]
    cells, frames = [cells[i] for i in kept], [frames[i] for i in kept]
    scores = [cell.score for cell in cells if cell.score is not None]
    sign = 1 if kind.higher_is_better else -1
    order = sorted(range(len(cells)), key=lambda i: (-sign * scores[i], cells[i].row))
    metrics = {task["task"]: task["metric"] for task in manifest["tasks"]}
    spans, letters = ranks(frames, metrics, sign, order)
    lines = []
    for place in order:
        cell, score = cells[place], scores[place]
        rank = 1 + sum(sign * other > sign * score for other in scores)
        chances = [task.chance for task in cell.tasks]
        parts = [
            (t.score - t.chance) / (1 - t.chance)
            for t in cell.tasks
            if t.chance is not None and t.score is not None and t.chance < 1
        ]
        normalised = sum(parts) / len(parts) if parts and len(parts) == len(chances) else None
        lines.append(
            Line(cell.row, score, cell.low, cell.high, cell.n, rank, *spans[place],
                 letters[place], normalised if kind.unit else None, "measured")
        )  # fmt: skip
    n, total = max((c.n for c in cells), default=0), sum(t["n_total"] for t in manifest["tasks"])
    partial = f"partial: {n} of {total} items" if n < total else ""
    notes = [f"not measured: {'; '.join(gaps)}"] if gaps else []
    if len(lines) > 1 and lines[0].rank_low is None:
        what = "the items that all rows have a score for give no mean over every task"
        notes.append(f"no rank intervals and no groups: {what}")
    protocol = f"{manifest['protocol']} {manifest.get('dtype')} seed {manifest.get('seed')}"
    return Board(
        manifest["suite"],
        protocol,
        kind.unit,
        kind.higher_is_better,
        partial,
        tuple(lines),
        "; ".join(notes),
    )


def _same_items(column: list[Run], frames: list[pd.DataFrame]) -> None:
    first = set(zip(frames[0].task, frames[0].doc_id, strict=True))
    if not first:
        raise NotComparable(f"{column[0].folder}/scores.parquet: no item; evaluate the row again")
    for run, frame in zip(column, frames, strict=True):
        other = set(zip(frame.task, frame.doc_id, strict=True))
        if other != first:
            raise NotComparable(
                f"{run.manifest['suite']}: {run.manifest['row']} has {len(other ^ first)} items "
                f"that {column[0].manifest['row']} has not, or the other way round; evaluate again"
            )


def _imported(files: Sequence[list[Imported]]) -> list[Board]:
    """One board for each task, metric, filter, shots, version and origin of imported scores."""
    grouped: dict[tuple[Any, ...], list[Imported]] = {}
    for file in files:
        for found in file:
            key = (found.task, found.metric, found.filter, found.shots, found.version, found.n)
            grouped.setdefault((*key, found.origin, found.higher_is_better), []).append(found)
    out = []
    for (task, metric, filter_, shots, version, _, origin, _), entries in grouped.items():
        sign = 1 if entries[0].higher_is_better else -1
        ordered = sorted(entries, key=lambda e: (-sign * e.score, e.model))
        protocol = f"{metric} {filter_} shots {shots} version {version}"
        if origin.startswith("published"):
            protocol = f"{metric}, as {origin.removeprefix('published: ')} has it"
        lines = tuple(_imported_line(e, entries, sign) for e in ordered)
        note = f"{origin}: no items, so no rank interval and no test between rows"
        unit = "" if metric in LOWER else "%"
        out.append(Board(task, protocol, unit, sign > 0, "", lines, note))
    return out


def _imported_line(one: Imported, all_: Sequence[Imported], sign: int) -> Line:
    rank = 1 + sum(sign * other.score > sign * one.score for other in all_)
    low = high = None
    if one.error is not None and math.isfinite(one.error):
        low, high = one.score - 1.959964 * one.error, one.score + 1.959964 * one.error
    n = one.n or 0
    return Line(one.model, one.score, low, high, n, rank, None, None, "", None, one.origin)
