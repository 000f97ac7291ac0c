"""The regression gate on made-up runs: error rates, and rules that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reports.compare import NotComparable
from reports.gate import Gate, default, judge
from reports.records import Run
from tests.reports.test_compare import RIGHT, evaluation


def pair(home: Path, base: dict, candidate: dict, **changes: str) -> list[tuple[Run, Run]]:
    folders = [evaluation(home, "b", base, **changes), evaluation(home, "c", candidate, **changes)]
    return [(Run.open(folders[0]), Run.open(folders[1]))]


def gate(**rule: object) -> Gate:
    return Gate.model_validate({"rules": [{"suite": "suite"} | rule]})


def test_superiority_passes_only_what_is_better(tmp_path: Path) -> None:
    runs = pair(tmp_path, {"a": RIGHT}, {"a": np.ones(100)})
    assert judge(gate(kind="superiority"), runs).outcome == "pass"
    turned = [(runs[0][1], runs[0][0])]
    assert judge(gate(kind="superiority"), turned).outcome == "fail"
    same = [(runs[0][0], runs[0][0])]
    assert judge(gate(kind="superiority"), same).outcome == "inconclusive"


def test_harm_to_one_task_shows_only_task_by_task(tmp_path: Path) -> None:
    harmed = RIGHT.copy()
    harmed[:40] = 0
    base = {"a": RIGHT, "b": RIGHT, "c": RIGHT, "d": RIGHT}
    runs = pair(tmp_path, base, base | {"d": harmed})
    assert judge(gate(kind="non_inferiority", margin=0.12), runs).outcome == "pass"
    result = judge(gate(kind="no_harm", margin=0.05), runs)
    assert [c.outcome for c in result.checks] == ["pass"] * 3 + ["fail"]
    assert result.outcome == "fail"
    assert judge(gate(kind="no_harm", margin=0.05, tasks=["a", "b"]), runs).outcome == "pass"


def test_a_margin_that_the_items_cannot_show_is_said(tmp_path: Path) -> None:
    changed = RIGHT.copy()
    changed[:10] = 1 - changed[:10]
    runs = pair(tmp_path, {"a": RIGHT}, {"a": changed})
    check = judge(default(runs), runs).checks[0]
    # Ten discordant of a hundred: (1.645 + 0.842)·√(0.1/100).
    assert check.needed == pytest.approx(2.486 * np.sqrt(0.1 / 100), rel=1e-3)
    assert check.power < 0.2
    assert check.outcome == "inconclusive"


def test_equal_bits_to_the_last_digit_lose_nothing(tmp_path: Path) -> None:
    bits = np.linspace(0.9, 1.1, 40)
    runs = pair(tmp_path, {"a": bits}, {"a": bits}, metric="bits_per_byte")
    assert judge(default(runs), runs).outcome == "pass"
    few = pair(tmp_path, {"a": bits[:5]}, {"a": bits[:5]}, metric="bits_per_byte", suite="few")
    assert judge(default(few), few).outcome == "inconclusive"


def test_a_suite_that_is_not_there_is_refused(tmp_path: Path) -> None:
    runs = pair(tmp_path, {"a": RIGHT}, {"a": RIGHT})
    wrong = Gate.model_validate({"rules": [{"suite": "x", "kind": "superiority"}]})
    with pytest.raises(NotComparable, match="not measured of both rows; measured: suite"):
        judge(wrong, runs)
    with pytest.raises(NotComparable, match="its tasks: a"):
        judge(gate(kind="no_harm", margin=0.1, tasks=["zz"]), runs)
