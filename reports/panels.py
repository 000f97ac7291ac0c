"""What a report page is made of: panels with figures and tables, as plain data.

A panel is a function of a Report that gives a Panel, or None where it has nothing to show, and its
line in the dictionary at the foot of its file (score_panels, making_panels, trust_panels, items).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reports.cells import Column, Report
from reports.lines import Line
from reports.text import number


@dataclass(frozen=True, slots=True)
class Value:
    """One place of a table.

    order: what its column is sorted by; None goes last. signature: which measurement it is.
    tone, note_tone: how it looks, a class of the page's style. note: a second, smaller line.
    """

    text: str
    order: float | str | None = None
    signature: str = ""
    tone: str = ""
    note: str = ""
    note_tone: str = ""


LONG_WORD = 30  # characters; a longer word is broken where its line ends
MISSING = Value("–", tone="gap")


@dataclass(frozen=True, slots=True)
class Table:
    """Head and lines; the first place of a line is its header.

    notes: second lines of the head. foot: lines that stay below, however the others are sorted.
    """

    caption: str
    head: Sequence[str]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()
    foot: tuple[tuple[Value, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing (an SVG element); the numbers behind it are in a table of the same panel."""

    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A part of the page.

    folded: whether tables are behind a summary, where figures tell the same or they are long.
    code: (summary, text) of what is shown as it is. data: what the page's script reads.
    """

    title: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: bool = False
    code: tuple[tuple[str, str], ...] = ()
    data: Any = None


Draw = Callable[[Report], Panel | None]


def words(text: Any, tone: str = "", note: str = "") -> Value:
    """A place that holds words; sorted by them."""
    long = any(len(word) > LONG_WORD for word in str(text).split())
    tone = " ".join(part for part in ("words", "long" if long else "", tone) if part)
    return Value(str(text), str(text).casefold(), tone=tone, note=note)


def count(value: float | None, digits: int = 0, signature: str = "") -> Value:
    """A place that holds a plain number, or a dash where there is none."""
    return MISSING if value is None else Value(f"{value:,.{digits}f}", float(value), signature)


def score(value: float | None, column: Column, **how: Any) -> Value:
    """A place that holds a score as its column gives it."""
    return MISSING if value is None else Value(number(value, column), order=value, **how)


def share(line: Line) -> tuple[Value, Value, Value]:
    """A fraction as percent, its interval, and of how many; dashes where there is none."""
    if line.value is None:
        return Value("–", tone="words gap", note=line.reason), MISSING, MISSING
    span = MISSING
    if line.low is not None and line.high is not None:
        span = Value(f"[{100 * line.low:.1f}, {100 * line.high:.1f}]", line.low)
    return Value(f"{100 * line.value:.1f}", line.value), span, count(line.n)
