"""Whether an untouched source lands on its published value: matched, off or not comparable.

A model that nobody trained, on the same questions, has no sampling error left: both numbers count
the same items (Miller, 2411.00640, on paired questions). What may move is rounding, and items that
another engine, batch or precision flips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from reports.cells import Report, TaskScore

# Share of items that an engine flips. HellaSwag moved by 4 of its 10,042 items between batch sizes
# 1 and 16 on one model (lm-evaluation-harness, issue 1645). m flips in either direction move the
# count by about sqrt(m), so 4 speak for about 16 flips.
FLIPPED = 16 / 10_042
SPREADS = 2.0  # standard deviations of the flips' net effect that still match


@dataclass(frozen=True)
class Verdict:
    """A published number beside the measured one; fractions."""

    row: str
    suite: str
    task: str  # its title, or an average's name
    published: float
    measured: float | None
    verdict: Literal["matched", "off", "not comparable"]
    tolerance: float | None
    reason: str
    source: str  # paper and table

    @property
    def difference(self) -> float | None:
        """Measured less published."""
        return None if self.measured is None else self.measured - self.published


def tolerance(n: int, decimals: int = 2) -> float:
    r"""How far a score of n items may lie from its printed value, a fraction.

        t = ½ · 10^(−decimals − 2) + SPREADS · √(FLIPPED / n)

    decimals: of the printed percentage. 0.08 points for HellaSwag, 0.51 for a BBH task of 250.
    FLIPPED comes from log-likelihoods; generated answers have no such report, and may flip more.
    ValueError if n is not positive.
    """
    if n <= 0:
        raise ValueError(f"n is {n}; a score has at least one item")
    return 0.5 * 10.0 ** (-decimals - 2) + SPREADS * math.sqrt(FLIPPED / n)


def macro_tolerance(sizes: list[int], decimals: int = 2) -> float:
    """`tolerance` of an unweighted mean over tasks of these sizes, whose flips are independent."""
    spread = math.sqrt(sum(FLIPPED / n for n in sizes)) / len(sizes)
    return 0.5 * 10.0 ** (-decimals - 2) + SPREADS * spread


def judge(
    measured: float | None, published: float, allowed: float, obstacles: list[str]
) -> tuple[Literal["matched", "off", "not comparable"], str]:
    """The verdict on one number, and its reason. obstacles: what forbids a comparison."""
    if measured is None:
        return "not comparable", "not measured"
    if obstacles:
        return "not comparable", "; ".join(obstacles)
    gap = abs(measured - published)
    word: Literal["matched", "off"] = "matched" if gap <= allowed else "off"
    return word, f"{100 * gap:.2f} points apart, {100 * allowed:.2f} allowed"


def calibrate(report: Report) -> list[Verdict]:
    """Every published number that the index names, judged against what its row measured."""
    out = []
    for entry in report.published:
        tasks = report.measured(entry["row"], entry["suite"])
        scores = {task.task: task for task in tasks if task.score is not None}
        source = f"{entry['paper']}, {entry['table']}"
        for name, published in entry["values"].items():
            covered = entry["averages"].get(name, [name])
            if name in entry.get("metrics", ()):
                covered = [task.task for task in tasks]
            there = [scores[task] for task in covered if task in scores]
            whole = bool(covered) and len(there) == len(covered)
            measured = sum(t.score or 0.0 for t in there) / len(there) if whole else None
            if name in entry.get("metrics", ()):
                other = report.other(entry["row"], entry["suite"], name)
                measured = other.score if other else None
                whole = whole and other is not None
            sizes = [task.n for task in there]
            allowed = macro_tolerance(sizes, entry["decimals"]) if whole else None
            verdict, reason = judge(measured, published, allowed or 0.0, _obstacles(entry, there))
            alone = name not in entry["averages"] and name not in entry.get("metrics", ())
            title = there[0].title if alone and there else name
            numbers = (published, measured, verdict, allowed, reason, source)
            out.append(Verdict(entry["row"], entry["suite"], title, *numbers))
    return out


def _obstacles(entry: dict[str, Any], there: list[TaskScore]) -> list[str]:
    """What forbids to compare a printed number with these tasks' scores."""
    found = [entry["unlike"]] if entry["unlike"] else []
    for task in there:
        expected = entry["items"].get(task.task, task.n_total)
        if task.n != expected:
            found.append(f"{task.title}: {task.n} of {expected} questions")
    return [*found[:2], f"and {len(found) - 2} more tasks"] if len(found) > 3 else found
