"""Rows that a recipe keeps as differences: measured first, gone, and had again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from fusion.checkpoints import identity
from fusion.errors import RecipeError, RunError
from fusion.models import load_model
from harness.keeping import restore_to
from harness.plan import plan
from harness.recipe import parse
from harness.run import run
from harness.store import read_manifest

RECIPE = """
sources: {{one: {{path: {one}}}, two: {{path: {two}}}}}
corpus: {{path: "tiny:corpus", blocks: 64, tokens: 256}}
variants:
  near: {{merge: {{inputs: [one, two], method: linear}}, keep: {{bits: 2}}}}
  same:
    merge: {{inputs: [one, two], method: linear, parameters: {{weights: [1, 3]}}}}
    keep: {{bits: exact, base: two}}
  user: {{merge: {{inputs: [same, one], method: linear}}}}
evaluate: {{suites: [tiny_text], limit: 4}}
reference: one
"""


@pytest.fixture
def recipe(tiny: dict[str, Path], tmp_path: Path) -> Path:
    other = tmp_path / "other"
    shutil.copytree(tiny["llama"], other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, other / "model.safetensors", {"a": "b"})
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(one=tiny["llama"], two=other))
    return path


def row(home: Path, name: str, which: int = 0) -> Path:
    """The folder of a row, of the one that was made first or later."""
    folders = home.glob(f"models/{name}-*")
    return sorted(folders, key=lambda folder: (folder / "manifest.json").stat().st_mtime_ns)[which]


def files(home: Path) -> dict[Path, int]:
    return {
        p: p.stat().st_mtime_ns
        for p in home.rglob("*")
        if p.is_file() and "reports" not in p.parts and p.name != "hashes.json"
    }


def test_rows_are_measured_then_kept_and_had_again(
    recipe: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(recipe), stages=("build",)) == 0
    whole = {name: identity(row(home, name)) for name in ("near", "same")}
    assert not list(home.rglob("model.delta"))  # nothing is measured yet
    assert run(str(recipe)) == 0
    for name in ("near", "same"):
        folder = row(home, name)
        assert not list(folder.glob("*.safetensors"))
        kept = (read_manifest(folder) or {})["kept"]
        assert kept["model"] == whole[name]
        assert kept["bytes"] == (folder / "model.delta").stat().st_size < kept["bytes_before"]
        assert kept["texts"] > 0
        if name == "near":
            assert abs(kept["bits_per_byte_lost"]) < 0.05
            before, after = kept["bits_per_byte"]
            assert kept["bits_per_byte_lost"] == after - before
    (index,) = home.glob("reports/recipe-*/index.json")
    told = {r["name"]: r["summary"] for r in json.loads(index.read_text())["rows"]}
    assert "difference from one, 2 bits an element" in told["near"]
    assert "exact difference from two" in told["same"]
    table = pd.read_csv(index.with_name("report.csv"))
    assert table[table.task.isna()].score.notna().all()

    before = files(home)
    assert run(str(recipe)) == 0
    assert files(home) == before

    # Another row needs what is kept exactly: its weights come back, and go again.
    again = ["variants.user.merge.parameters={weights: [2, 1]}"]
    assert run(str(recipe), again, stages=("build",)) == 0
    assert identity(row(home, "same")) == whole["same"]
    assert run(str(recipe)) == 0
    assert files(home).keys() - before.keys() == set(row(home, "user", 1).iterdir())
    # One that was kept with a loss is no ingredient, and is said to be none.
    capsys.readouterr()
    assert run(str(recipe), ["variants.user.merge.inputs=[near, one]"]) == 1
    assert f"kfuse restore {row(home, 'near').name} --to DIR" in capsys.readouterr().err

    assert "another model" in restore_to(home, "near", tmp_path / "near")
    assert load_model(tmp_path / "near").num_parameters() > 0
    assert "the same model" in restore_to(home, str(row(home, "same")), tmp_path / "same")
    assert identity(tmp_path / "same") == whole["same"]
    with pytest.raises(RunError, match="is there already"):
        restore_to(home, "near", tmp_path / "same")
    with pytest.raises(RunError, match="no kept models of that name.*kept: near-.*, same-"):
        restore_to(home, "user", tmp_path / "x")
    with pytest.raises(RunError, match="is not the base"):
        restore_to(home, "near", tmp_path / "x", tmp_path / "same")
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(RunError, match="other: the base that the delta was taken from"):
        restore_to(home, "same", tmp_path / "x")


def test_how_a_row_is_kept_is_not_what_it_is(recipe: Path, home: Path) -> None:
    def identities(*overrides: str) -> dict[str, str]:
        return plan(parse(recipe.read_text(), "r", overrides), home).identities

    assert identities() == identities("variants.near.keep=null", "variants.same.keep.bits=1")


def test_mistakes_are_told_before_any_work(recipe: Path) -> None:
    def told(*overrides: str) -> str:
        with pytest.raises(RecipeError) as error:
            parse(recipe.read_text(), "r", overrides)
        return str(error.value)

    assert "variants.near.keep.bits  'exakt' is unknown; known: 'exact'" in told(
        "variants.near.keep.bits=exakt"
    )
    assert "greater than 0" in told("variants.near.keep.bits=0")
    assert "variants.near.keep.bits  missing" in told("variants.near.keep={base: one}")
    assert "unknown key; allowed: bits, base" in told("variants.near.keep.rank=3")
    assert "'tow' is no other row" in told("variants.near.keep.base=tow")
    assert "'near' is no other row" in told("variants.near.keep.base=near")
    assert "kept with a loss" in told("variants.same.keep.base=near")
    text = recipe.read_text().replace(
        "  user:", "  e: {ensemble: {members: [one, two], rule: top1}, keep: {bits: 1}}\n  user:"
    )
    with pytest.raises(RecipeError, match="an ensemble has no weights to keep"):
        parse(text, "r")
