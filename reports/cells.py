"""What a report is made of, as plain data: cells with scores and gains, columns, and the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reports.gates import verdict
from reports.lines import Line
from reports.seeded import Seeded


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
    margin: float | None = None  # what does not matter, if the recipe says so

    @property
    def verdict(self) -> str:
        """better, worse or inconclusive at 5 % after Holm's correction; equivalent if the whole
        interval is within the margin.
        """
        return verdict(self.value, self.adjusted, self.low, self.high, self.margin)


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
    token_perplexity: float | None = None  # of whole texts, per token of the row's own tokenizer


@dataclass(frozen=True)
class Average:
    """Another average of a suite: without some tasks, of some answers, or by another metric."""

    title: str  # "without Go", "pass@10", "first turn"
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
    notes: tuple[str, ...] = ()  # what was not done the usual way
    without: Average | None = None  # also where the whole has no score for want of these tasks
    programs: tuple[tuple[str, int], ...] = ()  # how many ended how, of suites that run them
    passes: tuple[Average, ...] = ()  # pass@k beside pass@1, where problems have several samples
    others: tuple[Average, ...] = ()  # the suite's score by other metrics, where it has several

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
    task_of: str = ""  # the suite that was measured, where this is a task of one without an average

    @property
    def whole(self) -> str:
        """The name of the suite as it was measured."""
        return self.task_of or self.name


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
    lines: tuple[Line, ...] = ()  # reference lines
    domains: dict[str, Any] | None = None  # a paper's table of bits per byte by domain
    extra: dict[str, Any] = field(default_factory=dict)  # what else harness gathered, by panel
    seeded: tuple[Seeded, ...] = ()  # variants that have several training seeds

    def cell(self, row: str, suite: str) -> Cell:
        """The cell of a row and a suite."""
        return self.cells[row, suite]

    def parts(self, row: str, suite: str) -> list[Cell]:
        """A row's cell of a suite, or those of its tasks if it takes no average."""
        return [
            cell
            for cell in self.cells.values()
            if cell.row == row and (cell.suite == suite or cell.suite.startswith(f"{suite}/"))
        ]

    def measured(self, row: str, suite: str) -> list[TaskScore]:
        """The tasks of a suite that a row was measured on, also where each has its own cell."""
        return [task for cell in self.parts(row, suite) for task in cell.tasks]

    def other(self, row: str, suite: str, title: str) -> Average | None:
        """A row's score on a suite by another metric, if there is one of that title."""
        cell = self.cells.get((row, suite))
        return next((one for one in cell.others if one.title == title), None) if cell else None

    @property
    def gaps(self) -> list[Cell]:
        """Cells without a number."""
        return [cell for cell in self.cells.values() if cell.reason]
