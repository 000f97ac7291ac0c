"""Machines with an object store between them: what one makes the others have, once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.build import build, make
from harness.capturing import capture_share
from harness.model_folder import model_folder
from harness.plan import plan
from harness.recipe import load, parse
from harness.run import run
from harness.store import home
from tests.harness.mirrors import files

# What tells when or where something was made, and what it took.
OCCASION = ("manifest.json", "ledger.jsonl", "job.json", "training.csv", "header.json")
RECIPE = """
sources: {llama: {path: "tiny:llama"}}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 512}
variants:
  fused:
    train: {init: llama, fuse: {sources: [llama], function: min_ce, clm_weight: 0.9}}
    keep: {bits: exact, base: llama}
evaluate: {suites: [tiny_text], limit: 4}
reference: llama
"""


def test_one_machine_makes_and_measures_and_another_has_it(
    store: Path,
    at: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    first = at("first")
    assert run(str(recipe)) == 0
    there = files(store)
    assert not [name for name in there if name.startswith("running/")]
    assert [n for n in there if n.endswith("model.delta")]
    weights = [n for n in there if n.endswith(".safetensors")]
    assert {n.split("/")[1].partition("-")[0] for n in weights} == {"llama"}, "fused is kept"
    assert {n: there[n] for n in there if n in files(first)} == there
    capsys.readouterr()

    second = at("second")
    planned = plan(load(str(recipe)).recipe, home())
    assert all(step.done for step in planned.steps.values())
    assert not list(second.rglob("*.safetensors")), "weights come when they are read"
    before = {p: p.stat().st_mtime_ns for p in store.glob("[!r]*/*/*")}
    assert run(str(recipe)) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in store.glob("[!r]*/*/*")} == before
    assert list(model_folder(planned, "fused").glob("*.safetensors")), "from the difference"
    own = files(second)
    assert {n for n in weights if own[n] != there[n]} == set()

    cut = next(store.glob("evaluations/fused-*/samples-*.parquet"))
    os.truncate(cut, cut.stat().st_size - 1)
    at("third")
    assert run(str(recipe)) == 0
    assert "its items are measured again" in capsys.readouterr().err
    assert files(store)[str(cut.relative_to(store))] == there[str(cut.relative_to(store))]

    monkeypatch.setenv("KFUSE_HOME", str(tmp_path / "alone"))
    assert run(str(recipe)) == 0
    alone = files(tmp_path / "alone")
    rooms = ("distributions/", "models/", "evaluations/")
    assert {n for n in alone if n.startswith(rooms)} == {n for n in there if n.startswith(rooms)}
    for name, content in there.items():
        if name.startswith(rooms) and Path(name).name not in OCCASION:
            assert content == alone[name], name


def test_what_another_has_begun_is_gone_on_with(store: Path, at: Callable[[str], Path]) -> None:
    recipe = parse(RECIPE, "recipe")
    at("first")
    planned = plan(recipe, home())
    assert build(planned, ["llama"]) == {}
    (capture,) = (step for step in planned.builds() if step.kind == "capture")
    (pack,) = (step for step in planned.builds() if step.kind == "pack")
    assert make(planned, pack) is None
    capture_share(planned, capture, 0, 2)
    begun = files(store)
    assert any(n.endswith(".bin") for n in begun)

    at("second")
    planned = plan(recipe, home())
    (capture,) = (step for step in planned.builds() if step.kind == "capture")
    assert not capture.done
    assert make(planned, capture) is None
    after = files(store)
    shards = [n for n in begun if n.endswith(".bin")]
    assert {n: after[n] for n in shards} == {n: begun[n] for n in shards}
    assert not [n for n in after if "shard-" in n and n.endswith(".json")], "gathered"
    assert not [n for n in after if n.endswith("ledger.jsonl")], "it is in the manifest's cost"
