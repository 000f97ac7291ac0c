"""The cost table: every stage of a row, what is not known, and numbers that people can read."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from reports.cells import Cell, Column, Report
from reports.costs import MEASURES, by_row, comma_separated, frame, markdown, once, scaled

TRAINED = {
    "seconds": 12.34,
    "cpu_seconds": 20.0,
    "gpu_seconds": 0.0,
    "flops": 1.5e12,
    "tokens": 6144,
    "bytes": 2_000_000,
    "peak_memory_bytes": 3_000_000_000,
}
MERGED = TRAINED | {"flops": None, "tokens": 0}
MEASURED = TRAINED | {"flops_per_token": 270_000_000}


@pytest.fixture
def report() -> Report:
    def stage(kind: str, name: str, shared: int, cost: dict[str, Any]) -> dict[str, Any]:
        return {"stage": kind, "name": name, "shared_by": shared, "cost": cost}

    rows = (
        {"name": "a|b", "stages": [stage("train", "a|b", 1, TRAINED)]},
        {
            "name": "mix",
            "stages": [stage("pack", "corpus", 2, {}), stage("merge", "mix", 1, MERGED)],
        },
        {"name": "old"},  # an index from before the ledger
    )
    cells = {
        ("a|b", "s"): Cell("a|b", "s", cost=tuple(MEASURED.items()), run="evaluations/x"),
        ("mix", "s"): Cell("mix", "s", reason="not run"),
        ("old", "s"): Cell("old", "s", cost=(("seconds", 2.0),), run="evaluations/y"),
    }
    made: Any = SimpleNamespace(
        recipe="r",
        rows=rows,
        columns=(Column("s", "S", True, "%"),),
        cells=cells,
        cell=lambda row, suite: cells[row, suite],
        home=Path(),
    )
    return made


def test_a_line_for_each_row_and_stage(report: Report) -> None:
    costs = frame(report)
    assert list(costs.row) == ["a|b", "a|b", "mix", "mix", "old"]
    assert list(costs.stage) == ["train", "evaluate", "pack", "merge", "evaluate"]
    assert list(costs.shared_by) == [1, 1, 2, 1, 1]
    assert costs.flops[0] == 1.5e12
    assert costs.flops_per_token[1] == 270_000_000


def test_what_is_not_known_is_no_number(report: Report) -> None:
    costs = frame(report)
    assert costs.flops[3] != costs.flops[3]
    assert costs.loc[2, list(MEASURES)].isna().all()
    assert costs.gpu_seconds[0] == 0  # known to be none
    text = "\n".join(markdown(report))
    merged = next(line for line in text.splitlines() if line.startswith("| mix | merge |"))
    assert merged == "| mix | merge | 12.3 s | 20.0 s | 0.0 s | – | 0 | 2 MB | 3 GB | – |"
    assert r"| a\|b | train | 12.3 s | 20.0 s | 0.0 s | 1.5 T | 6.14 k |" in text
    assert "| mix | pack corpus (shared by 2) | – |" in text
    back = pd.read_csv(io.StringIO(comma_separated(report)))
    pd.testing.assert_frame_equal(back, costs, check_dtype=False)


def test_a_shared_stage_counts_in_each_row_and_is_listed_once() -> None:
    known = dict.fromkeys(MEASURES, float("nan"))
    told = [
        ("a", "pack", 2, 5.0),
        ("a", "train", 1, 7.0),
        ("b", "pack", 2, 5.0),
        ("b", "map", 1, 5.0),
    ]
    costs = pd.DataFrame(
        [
            {"row": row, "stage": stage, "of": "x", "shared_by": n} | known | {"seconds": seconds}
            for row, stage, n, seconds in told
        ]
    )
    assert list(by_row(costs).made) == [12.0, 10.0]
    assert by_row(costs).isna().sum().sum() == 2 * 5
    assert list(once(costs).stage) == ["pack", "train", "map"]


def test_without_ledgers_there_is_no_table(report: Report) -> None:
    empty: Any = SimpleNamespace(rows=({"name": "x"},), columns=(), cells={})
    assert markdown(empty) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.7, "1 k"),
        (123_456, "123 k"),
        (1.5e12, "1.5 T"),
        (2e21, "2e+03 E"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert scaled(value) == text


def test_what_is_not_a_number_is_a_dash() -> None:
    assert scaled(float("nan"), "B") == "–"
    assert scaled(5e9, "B") == "5 GB"
