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

from reports.compare import NotComparable, opened
from reports.lm_eval_results import Imported, read_results
from reports.records import Run, apart, read_json, read_primary
from reports.signature import differences

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

RANK_DRAWS = 1000
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

    A path is a run's folder, a folder of runs, a report's folder or index, or a result file of
    lm-eval. NotComparable or FileNotFoundError say what cannot be read.
    """
    runs: dict[Path, Run] = {}
    imported = []
    for path in paths:
        if path.suffix == ".json" and path.name != "index.json":
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


def _names(column: list[Run]) -> list[str]:
    """Row names, told apart by the model's identity where two are the same."""
    plain = [str(run.manifest["row"]) for run in column]
    return [
        name if plain.count(name) == 1 else f"{name}@{str(run.manifest['model_identity'])[:8]}"
        for name, run in zip(plain, column, strict=True)
    ]


def _board(column: list[Run]) -> Board:
    from reports.table import _cell, _column

    manifest = column[0].manifest
    frames = [opened(read_primary, run) for run in column]
    _same_items(column, frames)
    kind = _column({"name": manifest["suite"], "title": manifest["suite"], **manifest})
    names = _names(column)
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
    spans, letters = _ranks(frames, metrics, sign, order)
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
    note = f"not measured: {'; '.join(gaps)}" if gaps else ""
    protocol = f"{manifest['protocol']} {manifest.get('dtype')} seed {manifest.get('seed')}"
    return Board(
        manifest["suite"], protocol, kind.unit, kind.higher_is_better, partial, tuple(lines), note
    )


def _same_items(column: list[Run], frames: list[pd.DataFrame]) -> None:
    first = set(zip(frames[0].task, frames[0].doc_id, strict=True))
    for run, frame in zip(column, frames, strict=True):
        other = set(zip(frame.task, frame.doc_id, strict=True))
        if other != first:
            raise NotComparable(
                f"{run.manifest['suite']}: {run.manifest['row']} has {len(other ^ first)} items "
                f"that {column[0].manifest['row']} has not, or the other way round; evaluate again"
            )


def _ranks(
    frames: list[pd.DataFrame], metrics: dict[str, str], sign: int, order: list[int]
) -> tuple[list[tuple[int | None, int | None]], list[str]]:
    """Each row's 95 % interval of ranks, and letters of rows that are not told apart."""
    import numpy as np

    if len(frames) < 2:
        return [(None, None)] * len(frames), ["a"] * len(frames)
    drawn, scores, errors = _draws(frames, metrics, sign)
    rows = len(frames)
    # Of equal draws each has the better rank in the lower limit and the worse in the upper one.
    best = np.stack([1 + (drawn > drawn[i] + 1e-12).sum(axis=0) for i in range(rows)])
    worst = np.stack([(drawn >= drawn[i] - 1e-12).sum(axis=0) for i in range(rows)])
    low = np.quantile(best, 0.025, axis=1, method="lower")
    high = np.quantile(worst, 0.975, axis=1, method="higher")
    spans: list[tuple[int | None, int | None]] = [
        (int(a), int(b)) for a, b in zip(low, high, strict=True)
    ]
    return spans, _letters(scores, errors, order)


def _draws(
    frames: list[pd.DataFrame], metrics: dict[str, str], sign: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Macro scores of equal draws (rows, draws), scores, and errors of gains (rows, rows).

    An item that a row has no score for is left out for all rows.
    """
    import numpy as np

    from reports.corpus import CORPUS_METRICS, corpus_score, draws, stacked

    keyed = [f.set_index(["task", "doc_id"]).sort_index() for f in frames]
    values = sign * np.stack([f.value.to_numpy() for f in keyed])
    used = ~np.isnan(values).any(axis=0)
    tasks = keyed[0].index.get_level_values(0).to_numpy()[used]
    cluster, weight = keyed[0].cluster.to_numpy()[used], keyed[0].weight.to_numpy()[used]
    values = values[:, used]
    generator = np.random.default_rng(17)
    rows, names = len(frames), np.unique(tasks)
    drawn, scores = np.zeros((rows, RANK_DRAWS)), np.zeros(rows)
    variance = np.zeros((rows, rows))
    for name in names:
        inside = tasks == name
        metric = metrics[str(name)]
        if metric in CORPUS_METRICS:
            parts = np.stack([stacked(f.reset_index()[used][inside], metric) for f in keyed])
            found = sign * draws(parts, metric, generator, RANK_DRAWS)
            drawn += found / len(names)
            scores += sign * np.array([corpus_score(p, metric) for p in parts]) / len(names)
            variance += np.var(found[:, None] - found[None], axis=2) / len(names) ** 2
            continue
        _, code = np.unique(cluster[inside], return_inverse=True)
        size = int(code.max()) + 1
        mass = np.bincount(code, weights=weight[inside])
        sums = np.stack([np.bincount(code, weights=v * weight[inside]) for v in values[:, inside]])
        counts = generator.multinomial(size, np.full(size, 1 / size), RANK_DRAWS).astype(float)
        mean = sums.sum(axis=1) / mass.sum()
        drawn += (sums @ counts.T) / (counts @ mass) / len(names)
        scores += mean / len(names)
        left = (sums - mean[:, None] * mass) / mass.sum()
        shared = left @ left.T * (size / max(1, size - 1))
        spread = np.diag(shared)
        variance += (spread[:, None] + spread[None, :] - 2 * shared) / len(names) ** 2
    return drawn, scores, np.sqrt(np.maximum(variance, 0))


def _letters(scores: np.ndarray, errors: np.ndarray, order: list[int]) -> list[str]:
    """Compact letters: rows share one if no pair among them is told apart (Holm over all pairs)."""
    import numpy as np
    from scipy.stats import norm

    from reports.statistics import holm

    rows = len(scores)
    one, two = np.triu_indices(rows, 1)
    gap = np.abs(scores[one] - scores[two])
    error = errors[one, two]
    # Rows without any spread between them differ for sure or not at all; neither is a test.
    p = np.where(error > 1e-12, 2 * norm.sf(gap / np.maximum(error, 1e-12)), 1.0)
    apart = np.zeros((rows, rows), bool)
    apart[one, two] = holm(p) < 0.05
    apart |= apart.T
    groups: list[list[int]] = []
    for start in range(rows):
        group = [order[start]]
        for other in order[start + 1 :]:
            if apart[other, group].any():
                break
            group.append(other)
        if not groups or not set(group) <= set(groups[-1]):
            groups.append(group)
    letters = [""] * rows
    for number, group in enumerate(groups):
        for member in group:
            letters[member] += _letter(number)
    return letters


def _letter(number: int) -> str:
    name = chr(ord("a") + number % 26)
    return name if number < 26 else f"{name}{number // 26}"


def _imported(files: Sequence[list[Imported]]) -> list[Board]:
    """One board for each task, metric, filter, shots and version of imported files."""
    grouped: dict[tuple[Any, ...], list[Imported]] = {}
    for file in files:
        for found in file:
            key = (found.task, found.metric, found.filter, found.shots, found.version, found.n)
            grouped.setdefault(key, []).append(found)
    out = []
    for (task, metric, filter_, shots, version, _), entries in grouped.items():
        sign = 1 if entries[0].higher_is_better else -1
        ordered = sorted(entries, key=lambda e: (-sign * e.score, e.model))
        lines = []
        for e in ordered:
            rank = 1 + sum(sign * other.score > sign * e.score for other in entries)
            reach = None if e.error is None else 1.959964 * e.error
            bounded = reach is not None and math.isfinite(reach)
            low, high = (e.score - reach, e.score + reach) if bounded and reach else (None, None)
            lines.append(
                Line(e.model, e.score, low, high, e.n or 0, rank, None, None, "", None,
                     "imported from lm-eval")
            )  # fmt: skip
        protocol = f"{metric} {filter_} shots {shots} version {version}"
        note = "imported scores: no items, so no rank interval and no test between rows"
        unit = (
            "" if metric not in ("acc", "acc_norm", "exact_match", "pass@1", "pass_at_1") else "%"
        )
        out.append(Board(task, protocol, unit, sign > 0, "", tuple(lines), note))
    return out
