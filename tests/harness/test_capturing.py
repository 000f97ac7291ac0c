"""Captures in shares: the same store as in one piece, and nothing captured twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion import distributions
from fusion.distributions import gather, missing
from fusion.errors import RunError
from harness.build import build
from harness.capturing import CHUNK, capture_share
from harness.plan import Plan, Step, plan
from harness.recipe import parse
from harness.store import read_manifest


@pytest.fixture
def made(tiny: dict[str, Path], tmp_path: Path) -> tuple[Plan, Step]:
    """A plan whose corpus is packed, and its capture."""
    return planned(tiny, tmp_path / "home")


def planned(tiny: dict[str, Path], home: Path) -> tuple[Plan, Step]:
    recipe = f"""
sources: {{model: {{path: {tiny["llama"]}}}}}
corpus: {{path: "tiny:corpus", blocks: 64, tokens: 1280}}
variants:
  plain: {{train: {{init: model}}}}
  self:
    train: {{init: model, fuse: {{sources: [model], function: min_ce, clm_weight: 0.9}}}}
evaluate: {{suites: [tiny_text]}}
reference: model
machine: {{device: cpu}}
"""
    found = plan(parse(recipe, "r"), home)
    only = next(step for step in found.builds() if step.kind == "pack")
    reason = build_step(found, only)
    assert reason is None
    return found, next(step for step in found.builds() if step.kind == "capture")


def build_step(found: Plan, step: Step) -> str | None:
    from harness.build import make

    return make(found, step)


def contents(step: Step) -> dict[str, bytes]:
    names = [path for path in step.folder.iterdir() if path.name != "manifest.json"]
    return {path.name: path.read_bytes() for path in names}


def test_shares_in_any_order_come_to_the_same_store(
    made: tuple[Plan, Step], tiny: dict[str, Path], tmp_path: Path
) -> None:
    whole, one = planned(tiny, tmp_path / "whole")
    assert build_step(whole, one) is None
    found, step = made
    for share in (2, 0, 1):
        capture_share(found, step, share, 3)
    assert read_manifest(step.folder) is None, "the step's own job ends it"
    before = {p: p.stat().st_mtime_ns for p in step.folder.glob("shard-*.bin")}
    assert build_step(found, step) is None
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert contents(step) == contents(one)
    shared, alone = (read_manifest(s.folder) or {} for s in (step, one))
    assert shared["facts"] == alone["facts"]
    for key in ("flops", "tokens", "bytes"):
        assert shared["cost"][key] == alone["cost"][key]
    assert shared["cost"]["cpu_seconds"] > 0


def test_what_is_there_is_not_captured_again(
    made: tuple[Plan, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, step = made
    count = 20
    capture_share(found, step, 0, 3)
    assert missing(step.folder, count) == list(range(CHUNK, count))
    with pytest.raises(RunError, match="blocks 8, 9,"):
        gather(step.folder, count)
    written: list[int] = []
    own = distributions._write

    def counted(*given: object) -> dict:
        written.append(int(given[4]))  # type: ignore[call-overload]
        return own(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(distributions, "_write", counted)
    capture_share(found, step, 0, 2)  # another number of shares: chunks 0 and 2
    assert written == list(range(2 * CHUNK, count))
    assert build_step(found, step) is None, "and the step's own job does what is left"
    assert written == [*range(2 * CHUNK, count), *range(CHUNK, 2 * CHUNK)]
    capture_share(found, step, 0, 2)
    assert len(written) == count - CHUNK
    assert not list(step.folder.glob("shard-*.json"))


def test_a_row_that_needs_no_capture_is_built_beside_it(made: tuple[Plan, Step]) -> None:
    found, step = made
    assert build(found, ["plain"]) == {}
    assert not step.done
