"""Packs shared out to processes: the same bytes for any number, and what a dead one leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import shards
from harness.measuring import measure_rows
from harness.plan import Plan, Step, plan
from harness.recipe import parse
from harness.samples import parts
from harness.store import read_manifest


def planned(folder: Path, home: Path, text: Path, count: int) -> tuple[Plan, Step]:
    recipe = f"""
sources: {{model: {{path: {folder}}}}}
corpus: {{path: "tiny:corpus", blocks: 64, tokens: 512, heldout: {text}}}
evaluate: {{suites: [bits_per_byte]}}
reference: model
machine: {{shards: {count}, device: cpu}}
"""
    made = plan(parse(recipe, "r"), home)
    return made, made.evaluations("model")[0]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Texts for three packs of unlike size."""
    path = tmp_path / "own.jsonl"
    rows = [{"domain": "law", "text": f"{i} men {'walk ' * (i % 9)}home"} for i in range(130)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def contents(step: Step) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in [*parts(step.folder), step.folder / "scores.parquet"]}


def test_any_number_of_shards_gives_the_same_bytes(
    tiny: dict[str, Path], tmp_path: Path, text: Path
) -> None:
    found = {}
    for count in (1, 2, 5):
        made, step = planned(tiny["llama"], tmp_path / str(count), text, count)
        assert measure_rows(made, {"model": [step]}) == {}
        found[count] = contents(step)
        manifest = read_manifest(step.folder)
        assert manifest
        assert manifest["cost"]["packs_measured"] == 3
        assert manifest["cost"]["tokens"] > 0
    assert len(found[1]) == 4
    assert found[1] == found[2] == found[5]


def test_a_dead_process_is_named_and_what_the_others_did_is_kept(
    tiny: dict[str, Path], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, step = planned(tiny["llama"], tmp_path / "home", text, 2)
    monkeypatch.setattr(shards, "devices", lambda _: ["cpu", "no_such_device"])
    reasons = measure_rows(made, {"model": [step]})
    assert (
        "shard 2 of 2 (no_such_device) ended with exit status 1" in reasons["model/bits_per_byte"]
    )
    assert read_manifest(step.folder) is None
    assert [p.name for p in parts(step.folder)] == [f"samples-0000{n}.parquet" for n in (0, 2)]
    before = {p: p.stat().st_mtime_ns for p in parts(step.folder)}
    made, step = planned(tiny["llama"], tmp_path / "home", text, 1)
    assert measure_rows(made, {"model": [step]}) == {}, "any other number of shards goes on"
    assert all(p.stat().st_mtime_ns == before[p] for p in before)
    assert len(parts(step.folder)) == 3
