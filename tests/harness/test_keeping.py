"""Rows that a recipe keeps as differences: measured first, gone, and had again."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from fusion.checkpoints import identity
from fusion.corpus import read_blocks
from fusion.errors import RecipeError, RunError
from fusion.models import load_model
from harness import keeping
from harness.build import _carry_out, build
from harness.keeping import _texts, keep_rows, restore_to
from harness.measuring import Measuring
from harness.model_folder import model_folder
from harness.plan import Plan, plan
from harness.progress import working
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
def recipe(tiny: dict[str, Path], other: Path, tmp_path: Path) -> Path:
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
    # Not while another recipe's work stands on them.
    assert (
        run(str(recipe), ["variants.user.merge.parameters={weights: [3, 1]}"], (), ("build",)) == 0
    )
    capsys.readouterr()
    with working(home, "third", reads=[row(home, "same").name]):
        assert run(str(recipe)) == 0
        assert identity(row(home, "same")) == whole["same"]
    assert "same: its weights stay, third is being made from them" in capsys.readouterr().err
    assert run(str(recipe)) == 0
    assert not list(row(home, "same").glob("*.safetensors"))
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


CHAIN = """
sources: {{one: {{path: {one}}}, two: {{path: {two}}}}}
variants:
  a: {{merge: {{inputs: [one, two], method: linear}}, keep: {{bits: exact}}}}
  b:
    merge: {{inputs: [one, two], method: linear, parameters: {{weights: [1, 3]}}}}
    keep: {{bits: exact, base: a}}
evaluate: {{suites: [tiny_text], limit: 4}}
reference: one
"""


@pytest.fixture
def chain(recipe: Path, home: Path, tiny: dict[str, Path]) -> Plan:
    """Two rows that are made, the second to be kept as its difference from the first."""
    text = CHAIN.format(one=tiny["llama"], two=recipe.with_name("other"))
    made = plan(parse(text, "r"), home)
    assert build(made, ["a", "b"]) == {}
    return made


def test_a_row_comes_back_from_one_that_is_kept_itself(
    chain: Plan, home: Path, tmp_path: Path
) -> None:
    folders = {name: row(home, name) for name in ("a", "b")}
    before = {name: identity(folder) for name, folder in folders.items()}
    assert keep_rows(chain, ["a", "b"]) == {}
    assert not list(home.rglob("*.safetensors"))
    assert "the same model" in restore_to(home, "b", tmp_path / "out")
    assert identity(tmp_path / "out") == before["b"]
    assert keep_rows(chain, ["a", "b"]) == {}
    assert not list(home.rglob("*.safetensors"))
    assert model_folder(chain, "b") == folders["b"]
    assert {name: identity(folder) for name, folder in folders.items()} == before


def test_two_commands_that_keep_a_row_at_once_compress_it_once(
    chain: Plan, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressed, calls, reasons = keeping._compressed, list[str](), list[dict[str, str]]()

    def slowly(plan: Plan, row: str, *rest: Any) -> dict[str, Any]:
        calls.append(row)
        time.sleep(0.5)  # long enough for the other to begin
        return compressed(plan, row, *rest)

    monkeypatch.setattr(keeping, "_compressed", slowly)
    both = [
        threading.Thread(target=lambda: reasons.append(keep_rows(chain, ["a"]))) for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert reasons == [{}, {}]
    assert calls == ["a"]
    assert not list(row(home, "a").glob("*.safetensors"))


def test_rows_that_would_come_back_from_each_other_are_refused(
    chain: Plan, home: Path, recipe: Path, tiny: dict[str, Path]
) -> None:
    text = CHAIN.format(one=tiny["llama"], two=recipe.with_name("other"))
    for overrides in (["variants.a.keep.base=b"], ["variants.a.merge.inputs=[b, one]"]):
        with pytest.raises(RecipeError, match=r"variants.a.keep.base .* from themselves only"):
            parse(text, "r", overrides)
    # Two recipes that share a store cannot bring it about, either.
    assert keep_rows(chain, ["b"]) == {}
    other = parse(text, "r", ["variants.a.keep.base=b", "variants.b.keep=null"])
    made = plan(other, home)
    assert "b is itself kept as its difference from a" in keep_rows(made, ["a"])["a"]
    assert list(row(home, "a").glob("*.safetensors"))


def test_weights_that_came_back_in_part_come_back_whole(chain: Plan, home: Path) -> None:
    folder = row(home, "a")
    before = identity(folder)
    weights = load_file(folder / "model.safetensors")
    assert keep_rows(chain, ["a"]) == {}
    name = next(iter(weights))
    save_file({name: weights[name]}, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    assert identity(model_folder(chain, "a")) == before


def test_a_loss_is_measured_on_what_was_not_trained_on(recipe: Path, home: Path) -> None:
    text = recipe.read_text().replace(
        "  user:", "  town: {train: {init: one, domains: [village]}}\n  user:"
    )
    made = plan(parse(text, "r"), home)
    (step,) = (step for step in made.steps.values() if step.kind == "pack")
    _carry_out(made, step)
    blocks = read_blocks(step.folder / "blocks.parquet")
    read = [piece.text for block in blocks for piece in block]
    texts = _texts(made)
    assert texts
    assert not [text for text in texts if any(text.startswith(piece[:200]) for piece in read)]


def test_what_has_no_weights_is_neither_kept_nor_kept_from(recipe: Path) -> None:
    text = recipe.read_text().replace(
        "  user:", "  again: {repeat: {row: near}, keep: {bits: 1}}\n  user:"
    )
    with pytest.raises(RecipeError, match="variants.again.keep  a repeat has no weights to keep"):
        parse(text, "r")
    text = text.replace(", keep: {bits: 1}", "").replace("base: two", "base: again")
    with pytest.raises(RecipeError, match="'again' is a repeat: it has no weights"):
        parse(text, "r")


def test_weights_come_back_before_work_is_shared_out(
    chain: Plan, home: Path, recipe: Path, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = CHAIN.format(one=tiny["llama"], two=recipe.with_name("other"))
    text = text.replace("evaluate:", "  pack: {ensemble: {members: [a, b], rule: top1}}\nevaluate:")
    made = plan(parse(text, "r", ["machine.shards=2"]), home)
    assert keep_rows(made, ["a", "b"]) == {}
    there: list[list[str]] = []

    def measure_shards(*_: object) -> dict[str, str]:
        there.append(sorted(path.parent.name[0] for path in home.rglob("*.safetensors")))
        return {"": "not here"}

    monkeypatch.setattr("harness.shards.measure_shards", measure_shards)
    assert set(Measuring(made).measure("pack", made.evaluations("pack")).values()) == {"not here"}
    assert there == [["a", "b"]]
