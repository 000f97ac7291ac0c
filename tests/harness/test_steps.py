"""Rows that are equal in all but name: one folder, one measurement, a line of the report each."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.plan import plan
from harness.recipe import parse
from harness.report import _row
from harness.run import pending, run
from harness.store import read_manifest
from reports.cells import Gain
from reports.table import read

TEXT = """
sources:
  a: {path: "tiny:llama"}
  b: {path: "tiny:gemma"}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 640}
variants:
  fused: {train: {init: a, fuse: {sources: [a, b], function: min_ce, clm_weight: 0.9}}}
  other: {train: {init: a, fuse: {sources: [a, b], function: min_ce, clm_weight: 0.8}}}
  equal: {train: {init: a, budget: fused}}
  again: {train: {init: a, budget: other}}
  online: {train: {init: a, fuse: {sources: [a, b], function: min_ce, clm_weight: 0.9,
    online: true}}}
  kept: {train: {init: a, budget: fused}, keep: {bits: exact}}
evaluate: {suites: [tiny_text, tiny_choice]}
reference: equal
"""


def test_rows_that_are_one_model_share_every_step_and_each_has_its_measurements(
    home: Path,
) -> None:
    planned = plan(parse(TEXT, "r"), home)
    for first, twins in (("equal", ["equal", "again", "kept"]), ("fused", ["fused", "online"])):
        assert planned.twins(first) == twins
        for twin in twins:
            assert [s.name for s in planned.evaluations(twin)] == ["tiny_text", "tiny_choice"]
            assert planned.evaluations(twin) == planned.evaluations(first)
            assert planned.folders[twin] == planned.folders[first]
            assert planned.steps[planned.identities[twin]].folder == planned.folders[twin]
    waiting = pending(planned, planned.recipe.rows, ("build", "evaluate"))
    assert len({step.identity for step in waiting}) == len(waiting)
    assert len([step for step in waiting if step.kind == "evaluate"]) == 2 * 5


def test_the_same_model_twice_is_no_second_seed(home: Path) -> None:
    planned = plan(parse(TEXT, "r"), home)
    found = {row: _row(planned, row)["trained"] for row in planned.recipe.variants}
    assert found["equal"]
    assert found["again"] is found["kept"] is found["online"] is None


def test_twins_are_measured_once_and_both_are_reported(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "twins.yaml"
    recipe.write_text("""
sources: {a: {path: "tiny:llama"}, copy: {path: "tiny:llama"}}
variants: {one: {repeat: {row: a}}, two: {repeat: {row: a}}}
evaluate: {suites: [tiny_choice]}
reference: a
machine: {device: cpu}
""")
    assert run(str(recipe), only=["a", "two"]) == 0
    assert run(str(recipe)) == 0
    assert "all is built and measured" in capsys.readouterr().err
    assert len(list(home.glob("evaluations/*/manifest.json"))) == 2
    (index,) = home.glob("reports/*/index.json")
    report = read(index)
    assert [cell.row for cell in report.cells.values()] == ["a", "copy", "one", "two"]
    assert {cell.score for cell in report.cells.values()} == {report.cell("a", "tiny_choice").score}
    for row in ("copy", "one", "two"):
        gain = report.cell(row, "tiny_choice").gain
        assert isinstance(gain, Gain)
        assert (gain.value, gain.verdict) == (0.0, "inconclusive")


@pytest.mark.parametrize("content", [b"", b'{"kind": "tr', b"[]", b"\xff\xfe\x00"])
def test_a_damaged_manifest_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert read_manifest(tmp_path) is None
