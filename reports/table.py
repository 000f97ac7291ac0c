"""What a recipe's rows came to: rows × suites with scores, intervals, gains and reasons for gaps.

Read from the index that harness writes and the evaluation folders that it names; nothing is
measured here. A gain is paired, positive when the row is better whatever the metric's direction,
and taken only between runs whose signatures differ in nothing but the model. Not measured is never
a number.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.records import Run, read_json, read_primary
from reports.signature import differences, signature

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95


@dataclass(frozen=True)
class Gain:
    """A row against the reference on one suite; positive is better. Fractions or bits per byte."""

    value: float
    low: float | None
    high: float | None
    p_value: float
    adjusted: float  # Holm over all comparisons of the report
    detectable: float  # the smallest gain that these items show with 80 % power
    better: int  # items where the row has the better value
    worse: int
    n: int

    @property
    def verdict(self) -> str:
        """better, worse or inconclusive, at 5 % after Holm's correction."""
        if self.adjusted >= 0.05:
            return "inconclusive"
        return "better" if self.value > 0 else "worse"


@dataclass(frozen=True)
class TaskScore:
    """One task of a cell."""

    task: str
    title: str
    metric: str
    score: float | None  # None: no item was scored
    low: float | None
    high: float | None
    n: int
    n_total: int
    chance: float | None
    signature: str


@dataclass(frozen=True)
class Average:
    """A suite's second average, which leaves tasks out whose published scores mislead."""

    title: str  # "without Go"
    score: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Cell:
    """One row on one suite, or the reason why there is no number."""

    row: str
    suite: str
    reason: str | None = None
    score: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    n_total: int = 0
    signature: str = ""
    tasks: tuple[TaskScore, ...] = ()
    gain: Gain | None = None
    no_gain: str | None = None  # why there is a score but no gain
    health: tuple[tuple[str, int], ...] = ()
    cost: tuple[tuple[str, float], ...] = ()
    run: str = ""
    without: Average | None = None  # also where the whole has no score for want of these tasks
    programs: tuple[tuple[str, int], ...] = ()  # how many ended how, of suites that run them

    @property
    def partial(self) -> bool:
        """Whether only a sample of the suite was measured."""
        return self.reason is None and self.n_total > self.n


@dataclass(frozen=True)
class Column:
    """A suite as a column."""

    name: str
    title: str
    higher_is_better: bool
    unit: str  # "%" for fractions, "" for bits per byte


@dataclass(frozen=True)
class Report:
    """Everything that formats show."""

    recipe: str
    reference: str
    rows: tuple[dict[str, Any], ...]
    columns: tuple[Column, ...]
    cells: dict[tuple[str, str], Cell]
    facts: dict[str, Any]
    recipe_yaml: str
    overrides: tuple[str, ...]
    home: Path
    published: tuple[dict[str, Any], ...] = ()  # what papers printed for rows of this report

    def cell(self, row: str, suite: str) -> Cell:
        """The cell of a row and a suite."""
        return self.cells[row, suite]

    @property
    def gaps(self) -> list[Cell]:
        """Cells without a number."""
        return [cell for cell in self.cells.values() if cell.reason]


def read(index: Path) -> Report:
    """The report of an index file. ValueError or FileNotFoundError name what does not fit."""
    content = read_json(index)
    home = index.resolve().parent.parent.parent
    opened: dict[tuple[str, str], tuple[Run, pd.DataFrame]] = {}
    cells: dict[tuple[str, str], Cell] = {}
    for row in content["rows"]:
        for suite in content["suites"]:
            key = (row["name"], suite["name"])
            found = content["cells"][key[0]][key[1]]
            if "run" not in found:
                cells[key] = Cell(*key, reason=found["reason"])
                continue
            run = Run.open(home / found["run"])
            opened[key] = (run, read_primary(run))
            cell = _cell(*key, *opened[key], found["run"])
            cells[key] = replace(
                cell,
                without=_without(cell, suite.get("without", ())),
                programs=tuple(run.manifest.get("programs", {}).items()),
            )
    gains = _gains(content, opened)
    for key, gain in gains.items():
        changed = {"gain": gain} if isinstance(gain, Gain) else {"no_gain": gain}
        cells[key] = replace(cells[key], **changed)  # type: ignore[arg-type]
    return Report(
        recipe=content["recipe"],
        reference=content["reference"],
        rows=tuple(content["rows"]),
        columns=tuple(_column(suite) for suite in content["suites"]),
        cells=cells,
        facts=content["facts"],
        recipe_yaml=content["recipe_yaml"],
        overrides=tuple(content.get("overrides", ())),
        home=home,
        published=tuple(content.get("published", ())),
    )


def _column(suite: dict[str, Any]) -> Column:
    tasks = suite["tasks"]
    higher = all(task["higher_is_better"] for task in tasks)
    bits = bool(tasks) and all(task["metric"] == "bits_per_byte" for task in tasks)
    return Column(suite["name"], suite["title"], higher, "" if bits else "%")


def _generator(*names: str) -> Any:
    """A generator of its own for each number, so that adding a row changes no other interval."""
    import numpy as np

    return np.random.default_rng([zlib.crc32(name.encode()) for name in names])


def _cell(row: str, suite: str, run: Run, frame: pd.DataFrame, where: str) -> Cell:
    from reports.statistics import macro, macro_interval

    # A small sample may leave tasks out altogether; the suite's score is then that of the others.
    drawn = set(frame.task) if run.manifest["partial"] else None
    tasks = tuple(
        _task(run, task, frame[frame.task == task["task"]])
        for task in run.manifest["tasks"]
        if drawn is None or task["task"] in drawn
    )
    scored = [t for t in tasks if t.score is not None]
    n = sum(task.n for task in tasks)
    n_total = sum(task["n_total"] for task in run.manifest["tasks"])
    if len(scored) < len(tasks):
        names = ", ".join(t.title for t in tasks if t.score is None)
        reason = f"not measured: no item was scored in {names}"
        if _outcomes(frame, "infra"):
            reason += " (infrastructure: this machine could not judge them)"
        return Cell(row, suite, reason=reason, tasks=tasks, run=where)
    scores = [t.score for t in scored if t.score is not None]
    spans = [None if t.low is None or t.high is None else (t.low, t.high) for t in scored]
    interval = macro_interval(scores, spans)
    return Cell(
        row,
        suite,
        score=macro(scores),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        n=n,
        n_total=n_total,
        signature=signature(run.manifest, n, n_total),
        tasks=tasks,
        health=tuple(sorted(run.manifest.get("health", {}).items())),
        cost=tuple(sorted(run.manifest.get("cost", {}).items())),
        run=where,
    )


def _without(cell: Cell, names: Sequence[str]) -> Average | None:
    """The mean over a cell's other tasks; None if none is left out or one has no score."""
    from reports.statistics import macro, macro_interval

    out = [task.title for task in cell.tasks if task.task in names]
    kept = [task for task in cell.tasks if task.task not in names]
    scores = [task.score for task in kept if task.score is not None]
    if not out or not kept or len(scores) < len(kept):
        return None
    spans = [None if t.low is None or t.high is None else (t.low, t.high) for t in kept]
    low, high = macro_interval(scores, spans) or (None, None)
    title = f"without {', '.join(out)}"
    return Average(title, macro(scores), low, high, sum(task.n for task in kept))


def _outcomes(frame: pd.DataFrame, kind: str) -> int:
    return int((frame.outcome == kind).sum())


def _task(run: Run, task: dict[str, Any], frame: pd.DataFrame) -> TaskScore:
    from reports.statistics import score_interval

    scored = frame[frame.value.notna()]
    score = interval = None
    if len(scored):
        score = float((scored.value * scored.weight).sum() / scored.weight.sum())
        interval = score_interval(
            scored.value,
            _generator(run.manifest["row"], run.manifest["suite"], task["task"]),
            weights=scored.weight,
            clusters=scored.cluster,
            level=LEVEL,
        )
    return TaskScore(
        task["task"],
        task.get("title", task["task"]),
        task["metric"],
        score,
        interval[0] if interval else None,
        interval[1] if interval else None,
        len(scored),
        task["n_total"],
        task.get("chance"),
        signature(run.manifest, len(scored), task["n_total"], task["task"]),
    )


def _gains(
    content: dict[str, Any], opened: dict[tuple[str, str], tuple[Run, pd.DataFrame]]
) -> dict[tuple[str, str], Gain | str]:
    """Every row against the reference, suite by suite, p-values corrected together."""
    from reports.statistics import holm

    out: dict[tuple[str, str], Gain | str] = {}
    for (row, suite), (run, frame) in opened.items():
        if row == content["reference"]:
            continue
        base = opened.get((content["reference"], suite))
        if base is None:
            out[row, suite] = "the reference is not measured"
            continue
        wrong = differences(run.manifest, base[0].manifest)
        if wrong:
            out[row, suite] = "not comparable: " + "; ".join(wrong)
            continue
        out[row, suite] = _compare(run, frame, base[1])
    compared = [key for key, gain in out.items() if isinstance(gain, Gain)]
    found = [out[key] for key in compared]
    adjusted = holm([gain.p_value for gain in found if isinstance(gain, Gain)])
    for key, gain, p in zip(compared, found, adjusted, strict=True):
        if isinstance(gain, Gain):
            out[key] = replace(gain, adjusted=float(p))
    return out


def _compare(run: Run, frame: pd.DataFrame, base: pd.DataFrame) -> Gain | str:
    from reports.statistics import minimum_detectable_effect, paired_bootstrap

    keys = ["task", "doc_id"]
    both = frame.merge(base, on=keys, suffixes=("", "_base"), validate="one_to_one")
    alone = len(frame) + len(base) - 2 * len(both)
    if alone:
        return f"not comparable: {alone} items were measured on one side only"
    both = both[both.value.notna() & both.value_base.notna()]
    if both.empty:
        return "not comparable: no item was scored on both sides"
    higher = {task["task"]: task["higher_is_better"] for task in run.manifest["tasks"]}
    sign = both.task.map(higher).map({True: 1.0, False: -1.0})
    manifest = run.manifest
    paired = paired_bootstrap(
        both.value * sign,
        both.value_base * sign,
        _generator(manifest["row"], manifest["suite"], "gain"),
        tasks=both.task,
        weights=both.weight,
        clusters=both.cluster,
        level=LEVEL,
    )
    return Gain(
        paired.gain,
        paired.low,
        paired.high,
        paired.p_value,
        1.0,
        # null_variance is that of the mean itself, so n is one.
        minimum_detectable_effect(paired.null_variance, 1),
        paired.better,
        paired.worse,
        paired.n,
    )
