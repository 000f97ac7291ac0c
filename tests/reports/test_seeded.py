"""Variants with several training seeds in a report, and gains that do not matter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from reports.formats import headline, markdown
from reports.seeds import seeds_and_items
from reports.table import read
from tests.reports.test_report import RIGHT, run, store


def index(home: Path, rows: dict[str, np.ndarray], trained: dict[str, str], **changes: object):
    runs = {row: {"acc": {"run": run(home, row, v, **changes)}} for row, v in rows.items()}
    path = store(home, runs)
    content = json.loads(path.read_text())
    content["suites"] = content["suites"][:1]
    for row in content["rows"]:
        row["trained"] = trained.get(row["name"])
    path.write_text(json.dumps(content))
    return path


def seeds(base: np.ndarray, count: int, share: float) -> dict[str, np.ndarray]:
    """Rows that turn other wrong answers of the base into right ones."""
    g = np.random.default_rng(3)
    wrong = np.flatnonzero(base == 0)
    out = {}
    for seed in range(count):
        values = base.copy()
        values[g.choice(wrong, int(share * len(wrong)), replace=False)] = 1
        out[f"{seed}-fused"] = values
    return out


def test_a_variant_with_three_seeds_has_a_line_of_its_own(tmp_path: Path) -> None:
    rows = seeds(RIGHT, 3, 0.8)
    path = index(tmp_path, {"base": RIGHT} | rows, dict.fromkeys(rows, "f1"))
    (line,) = read(path).seeded
    expected = seeds_and_items(np.stack(list(rows.values())), RIGHT[None])
    assert line.rows == tuple(rows)
    assert line.reference == ("base",)
    assert line.gain == pytest.approx(expected.gain)
    assert (line.low, line.high) == pytest.approx((expected.low, expected.high))
    assert line.verdict == "better"
    assert "## Over training seeds" in markdown(read(path))


def test_the_references_own_seeds_count(tmp_path: Path) -> None:
    rows = seeds(RIGHT, 2, 0.5)
    base = {f"{name[0]}-base": v for name, v in seeds(RIGHT, 2, 0.4).items()} | {"base": RIGHT}
    trained = dict.fromkeys(rows, "f1") | dict.fromkeys(base, "b1")
    (line,) = read(index(tmp_path, base | rows, trained)).seeded
    assert set(line.reference) == set(base)


def test_rows_of_one_seed_have_no_line_and_no_heading(tmp_path: Path) -> None:
    path = index(tmp_path, {"base": RIGHT, "other": 1 - RIGHT}, {"base": "b1", "other": "f1"})
    assert read(path).seeded == ()
    assert "training seeds" not in markdown(read(path))


def test_all_right_against_all_wrong_is_no_claim_about_other_seeds(tmp_path: Path) -> None:
    rows = {f"{seed}-fused": np.ones(2) for seed in range(2)}
    path = index(tmp_path, {"base": np.zeros(2)} | rows, dict.fromkeys(rows, "f1"))
    assert read(path).seeded == ()


def test_a_seed_that_lacks_items_takes_the_line_away(tmp_path: Path) -> None:
    rows = seeds(RIGHT, 2, 0.5)
    rows["1-fused"] = np.where(np.arange(len(RIGHT)) == 3, np.nan, rows["1-fused"])
    path = index(tmp_path, {"base": RIGHT} | rows, dict.fromkeys(rows, "f1"))
    assert read(path).seeded == ()


def test_weights_and_clusters_are_kept(tmp_path: Path) -> None:
    import pandas as pd

    rows = seeds(RIGHT, 2, 0.5)
    path = index(tmp_path, {"base": RIGHT} | rows, dict.fromkeys(rows, "f1"))
    for file in (tmp_path / "evaluations").glob("*/scores.parquet"):
        frame = pd.read_parquet(file)
        frame["weight"] = 1.0 + frame.doc_id % 3
        frame["cluster"] = (frame.doc_id // 4).astype(str)
        frame.to_parquet(file)
    found = read(path)
    gains = [found.cell(row, "acc").gain.value for row in rows]  # type: ignore[union-attr]
    assert found.seeded[0].gain == pytest.approx(np.mean(gains))


@pytest.mark.parametrize(("margin", "word"), [(0.2, "equivalent"), (0.0001, "inconclusive")])
def test_a_gain_within_the_margin_is_equivalent(tmp_path: Path, margin: float, word: str) -> None:
    other = RIGHT.copy()
    other[[0, 1]] = 1 - other[[0, 1]]  # one item gained and one lost
    path = index(tmp_path, {"base": RIGHT, "other": other}, {})
    content = json.loads(path.read_text())
    content["suites"][0]["margin"] = margin
    path.write_text(json.dumps(content))
    gain = read(path).cell("other", "acc").gain
    assert gain is not None
    assert gain.verdict == word
    assert ("equivalent on acc: other" in headline(read(path))) == (word == "equivalent")
