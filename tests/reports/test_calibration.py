"""Published numbers beside measured ones: what matches, what is off, what cannot be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from reports.calibration import judge, macro_tolerance, tolerance
from reports.formats import markdown
from reports.table import read
from tests.reports.test_report import run, store


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
    ("published", "items", "unlike", "shown"),
    [
        (0.60, 40, "", r"| base | acc | first | 60.00 | 60.00 | +0.00 | matched: 0.00 points"),
        (0.70, 40, "", r"| base | acc | first | 70.00 | 60.00 | -10.00 | off: 10.00 points"),
        (0.60, 100, "", r"| not comparable: first: 40 of 100 questions |"),
        (0.60, 40, "other prompts", r"| not comparable: other prompts |"),
    ],
)
def test_markdown_shows_published_beside_measured(
    tmp_path: Path, published: float, items: int, unlike: str, shown: str
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
        "values": {"t1": published, "average": published},
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


def test_without_published_numbers_there_is_no_section(tmp_path: Path) -> None:
    values = np.array([1, 0] * 20)
    path = store(
        tmp_path,
        {"base": {"acc": {"run": run(tmp_path, "base", values)}, "bits": {"reason": "no"}}},
    )
    assert "## Published" not in markdown(read(path))
