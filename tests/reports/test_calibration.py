"""Published numbers beside measured ones: what matches, what is off, what cannot be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reports.calibration import judge, macro_tolerance, tolerance
from reports.formats import markdown
from reports.table import read
from reports.trust_panels import published
from tests.reports.test_report import TASK, run, store


def test_the_tolerance_is_rounding_and_twice_the_flips() -> None:
    # By hand: 16/10,042 of the items flip; HellaSwag: 2·√16/10,042 and half a hundredth of a point.
    assert tolerance(10_042) == pytest.approx(0.00005 + 2 * 4 / 10_042)
    assert tolerance(250) == pytest.approx(0.0051, abs=1e-4)
    assert macro_tolerance([250]) == pytest.approx(tolerance(250))
    four = macro_tolerance([250] * 4) - 0.00005
    assert four == pytest.approx((tolerance(250) - 0.00005) / math.sqrt(4))
    with pytest.raises(ValueError, match="at least one"):
        tolerance(0)


def test_a_number_is_matched_off_or_not_comparable() -> None:
    allowed = tolerance(10_042)
    assert judge(0.7600 + 0.0004, 0.7600, allowed, [])[0] == "matched"
    assert judge(0.7600 - 0.0010, 0.7600, allowed, [])[0] == "off"
    assert judge(0.76, 0.76, allowed, ["10 of 20 questions"]) == (
        "not comparable",
        "10 of 20 questions",
    )
    assert judge(None, 0.76, allowed, []) == ("not comparable", "not measured")


@pytest.mark.parametrize(
    ("printed", "items", "unlike", "shown"),
    [
        (0.60, 40, "", r"| base | acc | first | 60.00 | 60.00 | +0.00 | matched: 0.00 points"),
        (0.70, 40, "", r"| base | acc | first | 70.00 | 60.00 | -10.00 | off: 10.00 points"),
        (0.60, 100, "", r"| not comparable: first: 40 of 100 questions |"),
        (0.60, 40, "other prompts", r"| not comparable: other prompts |"),
    ],
)
def test_markdown_shows_published_beside_measured(
    tmp_path: Path, printed: float, items: int, unlike: str, shown: str
) -> None:
    values = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 1] * 4)
    cells = {
        row: {"acc": {"run": run(tmp_path, row, values)}, "bits": {"reason": "not run"}}
        for row in ("base", "other")
    }
    path = store(tmp_path, cells)
    entry = {
        "row": "base",
        "suite": "acc",
        "paper": "A paper",
        "table": "table 9",
        "values": {"t1": printed, "average": printed},
        "averages": {"average": ["t1"]},
        "items": {"t1": items},
        "decimals": 2,
        "unlike": unlike,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"published": [entry]}))
    text = markdown(read(path))
    assert "## Published" in text
    assert shown in text
    assert "A paper, table 9" in text
    assert text.count("| base | acc | average |") == 1


def test_a_second_average_stands_beside_its_own_numbers_and_not_the_wholes(tmp_path: Path) -> None:
    tasks = [TASK | {"task": name, "title": name.title(), "n_total": 20} for name in ("go", "rust")]
    how = {"tasks": tasks, "partial": False}
    worse = np.array([1, 0, 0, 1] * 10)
    better = np.where(np.arange(40) % 2 == 0, 1, worse)  # gains in Go alone
    rows = {"base": worse, "other": better}
    cells = {row: {"acc": {"run": run(tmp_path, row, v, **how)}} for row, v in rows.items()}
    path = store(tmp_path, cells)
    content = json.loads(path.read_text())
    content["suites"] = [content["suites"][0] | {"tasks": tasks, "without": ["go"]}]
    averages = {"average": ["go", "rust"], "average without Go": ["rust"]}
    entry = {"suite": "acc", "paper": "P", "table": "t", "averages": averages, "items": {}}
    entry |= {"decimals": 2, "unlike": "", "values": dict.fromkeys(averages, 0.5)}
    content["published"] = [entry | {"row": row} for row in rows]
    path.write_text(json.dumps(content))
    for scores in tmp_path.glob("evaluations/*/scores.parquet"):
        frame = pd.read_parquet(scores)
        frame.assign(task=["go", "rust"] * 20).to_parquet(scores)
    report = read(path)
    panel = published(report)
    assert panel
    scores_table, gains = panel.tables
    cell = report.cell("other", "acc")
    assert cell.without
    reach = {(x[0].text, x[2].text): x[6].order for x in scores_table.rows}
    assert reach["other", "average without Go"] == cell.without.high - cell.without.low  # type: ignore[operator]
    assert reach["other", "average"] == cell.high - cell.low  # type: ignore[operator]
    assert [line[1].text for line in gains.rows] == ["acc, average"]


def test_other_metrics_and_two_papers_stand_beside_their_own_numbers(tmp_path: Path) -> None:
    task = TASK | {"metric": "rating", "n_total": 40}
    grades = {"base": np.array([0.4, 0.6] * 20), "other": np.array([0.5, 0.7] * 20)}
    cells = {}
    for row, values in grades.items():
        where = run(tmp_path, row, values, tasks=[task], partial=False, judge={"model": "j"})
        cells[row] = {"acc": {"run": where}}
        frame = pd.read_parquet(tmp_path / where / "scores.parquet").assign(metric="rating")
        turns = [frame.assign(metric=f"rating_turn_{n}", value=values - 0.1 * n) for n in (1, 2)]
        pd.concat([frame, *turns]).to_parquet(tmp_path / where / "scores.parquet")
    path = store(tmp_path, cells)
    content = json.loads(path.read_text())
    content["suites"] = [content["suites"][0] | {"tasks": [task]}]
    entry = {"suite": "acc", "table": "t", "averages": {"average": ["t1"]}, "items": {}}
    entry |= {"decimals": 1, "unlike": ""}
    old = entry | {"paper": "Old", "metrics": [], "values": {"average": 0.5}}
    new = entry | {"paper": "New", "metrics": ["second turn", "third turn"]}
    new |= {"values": {"average": 0.3, "second turn": 0.3, "third turn": 0.2}}
    content["published"] = [e | {"row": row} for row in grades for e in (old, new)]
    content["published"][2]["values"] = {"average": 0.75}  # Old says +25 points of the other
    path.write_text(json.dumps(content))
    report = read(path)
    text = markdown(report)
    assert "| base | acc | average | 50.00 | 50.00 | +0.00 | matched" in text
    assert "| base | acc | average | 30.00 | 50.00 | +20.00 | off" in text
    assert "| base | acc | second turn | 30.00 | 30.00 | +0.00 | matched" in text
    assert "| other | acc | second turn | 30.00 | 40.00 | +10.00 | off" in text
    assert "| base | acc | third turn | 20.00 | – | – | not comparable: not measured" in text
    panel = published(report)
    assert panel
    gains = [line[2].text for line in panel.tables[1].rows]
    assert gains == ["+25.00", "+0.00"]  # each against its own paper; turns have no gain


def test_without_published_numbers_there_is_no_section(tmp_path: Path) -> None:
    values = np.array([1, 0] * 20)
    path = store(
        tmp_path,
        {"base": {"acc": {"run": run(tmp_path, "base", values)}, "bits": {"reason": "no"}}},
    )
    assert "## Published" not in markdown(read(path))
