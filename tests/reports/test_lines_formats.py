"""Reference lines and domains as text: numbers with intervals, and reasons where none is."""

from __future__ import annotations

import io
from copy import copy
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from reports.cells import Cell, Column, Report, TaskScore
from reports.lines import BEST, EMERGENT, FORGOTTEN, GAP, ITEM_ORACLE, TASK_ORACLE, WON, Line
from reports.lines_formats import comma_separated, markdown, tables, terminal

ROW = "fu|sed"


def score(title: str, value: float | None) -> TaskScore:
    return TaskScore(title, title, "bits_per_byte", value, None, None, 3, 3, None, "")


@pytest.fixture
def report() -> Report:
    cells = {
        ("a", "acc"): Cell("a", "acc", score=0.5),
        (ROW, "acc"): Cell(ROW, "acc", score=0.5),
        ("a", "bits"): Cell(
            "a", "bits", score=1.0, tasks=(score("papers", 0.9), score("stories", 1.1))
        ),
        (ROW, "bits"): Cell(ROW, "bits", reason="not measured: not run yet"),
    }
    lines = (
        Line("", ROW, WON, 0.25, 0.1, 0.5, 12, "a: 3 of 12"),
        Line("acc", "", BEST, 0.5, 0.4, 0.6, 10, "a"),
        Line("acc", "", TASK_ORACLE, 0.55, None, None, 10, "a on 1 of 2 tasks"),
        Line("acc", "", ITEM_ORACLE, reason="not measured: no records of b"),
        Line("acc", ROW, GAP, 0.4, -0.2, 0.9, 10, "over a"),
        Line("acc", ROW, FORGOTTEN, 0.25, 0.1, 0.5, 4, "1 of 4 that a had right"),
        Line("bits", "", BEST, 1.0, 0.9, 1.1, 6, "a"),
    )
    made: Any = SimpleNamespace(
        recipe="r",
        lines=lines,
        rows=({"name": "a"}, {"name": ROW}),
        columns=(Column("acc", "Accuracy", True, "%"), Column("bits", "Bits", False, "")),
        cell=lambda row, suite: cells[row, suite],
        domains={
            "source": "A paper, table 7",
            "unlike": "other text",
            "columns": ["Phil", "average"],
            "rows": {"Pythia": [0.9008, 0.7275]},
        },
    )
    return made


def test_each_line_has_its_place_and_its_unit(report: Report) -> None:
    text = markdown(report)
    for line in (
        r"| acc | 50.0 \[40.0, 60.0\] (a) | 55.0 (a on 1 of 2 tasks) "
        r"| not measured: no records of b |",
        r"| bits | 1.0000 \[0.9000, 1.1000\] (a) | – | – |",
        r"| acc | fu\|sed | 40.0 % \[-20.0, 90.0\] (over a) "
        r"| 25.0 % \[10.0, 50.0\] (1 of 4 that a had right) | – |",
        r"| fu\|sed | 25.0 % \[10.0, 50.0\] (a: 3 of 12) |",
    ):
        assert line in text
    assert sum(line.startswith("gap recovered: the way") for line in text) == 1


def test_domains_stand_beside_the_papers_and_are_not_compared(report: Report) -> None:
    found = {title: (heading, body) for title, heading, body in tables(report)}
    heading, body = found["bits by domain (bits, lower is better)"]
    assert heading == ["row", "papers", "stories", "average"]
    # What is not measured is a dash, also in the average.
    assert body == [["a", "0.9000", "1.1000", "1.0000"], [ROW, "–", "–", "–"]]
    paper = "A paper, table 7, as printed: not comparable (other text)"
    assert found[paper] == (["row", "Phil", "average"], [["Pythia", "0.9008", "0.7275"]])


def test_a_terminal_shows_a_papers_domains_and_leaves_lines_to_files(report: Report) -> None:
    from rich.console import Console

    plain = copy(report)
    plain.domains = None
    assert terminal(plain) == []
    console = Console(width=200, record=True)
    with console.capture() as shown:
        console.print(*terminal(report))
    assert "Pythia │ 0.9008 │ 0.7275" in shown.get()
    assert "not comparable" in shown.get()
    assert "25.0 % [10.0, 50.0]" not in shown.get()


def test_csv_has_fractions_and_empty_fields(report: Report) -> None:
    back = pd.read_csv(io.StringIO(comma_separated(report)))
    assert list(back.line) == [line.name for line in report.lines]
    assert back.value[0] == 0.25
    assert pd.isna(back.value[3])
    assert back.reason[3] == "not measured: no records of b"


def test_nothing_to_say_is_no_section(report: Report) -> None:
    empty: Any = SimpleNamespace(rows=(), columns=(), lines=(), domains=None)
    assert markdown(empty) == []
    assert EMERGENT not in str(tables(empty))
