"""Statistics in a store: collected once for every merge that names them; recipes that cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion.errors import RecipeError
from harness.plan import plan
from harness.recipe import parse
from harness.run import run
from harness.store import read_manifest

RECIPE = """
sources: {{one: {{path: {one}}}, two: {{path: {two}}}}}
corpus: {{path: "tiny:corpus", blocks: 64, tokens: 256}}
variants:
  fisher: {{merge: {{inputs: [one, two], method: fisher, parameters: {{blocks: 2}}}}}}
  floored:
    merge: {{base: one, inputs: [two, one], method: fisher, parameters: {{blocks: 2, floor: 0.1}}}}
  regmean: {{merge: {{base: one, inputs: [two, one], method: regmean, parameters: {{blocks: 2}}}}}}
  drawn: {{merge: {{inputs: [one, two], method: fisher, parameters: {{blocks: 2, labels: model}}}}}}
evaluate: {{suites: [tiny_text]}}
reference: one
"""


@pytest.fixture
def recipe(tiny: dict[str, Path], other: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(one=tiny["llama"], two=other))
    return path


def test_statistics_are_collected_once_and_kept(recipe: Path, home: Path) -> None:
    assert run(str(recipe), stages=("build",)) == 0
    found = sorted(home.glob("distributions/statistics-*"))
    # Of two models each: squares for both fishers together, squares of drawn labels, and inputs.
    assert len(found) == 6
    for folder in found:
        manifest = read_manifest(folder)
        assert manifest
        assert manifest["cost"]["bytes"] >= manifest["facts"]["bytes"] > 0
        assert manifest["cost"]["seconds"] > 0
        assert manifest["facts"]["blocks"] == manifest["content"]["blocks"] == 2
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*") if p.is_file()}
    another = ["variants.fisher.merge.parameters.floor=0.5"]
    assert run(str(recipe), another, stages=("build",)) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    new = {p.parent.name.split("-")[0] for p in home.glob("*/*/manifest.json") if p not in before}
    assert new == {"fisher"}
    assert json.loads((home / "hashes.json").read_text())


def test_what_statistics_are_from_is_in_their_name(recipe: Path, home: Path) -> None:
    text = recipe.read_text()

    def names(*overrides: str) -> set[str]:
        steps = plan(parse(text, "r", overrides), home).steps.values()
        return {step.folder.name for step in steps if step.kind == "statistics"}

    plain = names()
    assert names("variants.fisher.merge.parameters.weights=[2,1]") == plain
    assert len(names("variants.fisher.merge.parameters.blocks=3") - plain) == 2
    assert not names("corpus.tokens=192") & plain
    drawn = "variants.drawn.merge.parameters"
    assert len(plain - names(f"{drawn}.labels=data")) == 2


def test_mistakes_are_told_before_any_work(recipe: Path) -> None:
    def told(*overrides: str, without: str = "") -> str:
        text = "\n".join(
            line for line in recipe.read_text().splitlines() if not without or without not in line
        )
        with pytest.raises(RecipeError) as error:
            parse(text, "r", overrides)
        return str(error.value)

    at = "variants.fisher.merge.parameters"
    assert "5 is not right; the corpus has 4 blocks" in told(f"{at}.blocks=5")
    for wrong in ("0", "true", "2.5", "[1]"):
        assert f"{at}.blocks" in told(f"{at}.blocks={wrong}")
    assert "'both' is unknown; known: data, model" in told(f"{at}.labels=both")
    assert "allowed: scaling, blocks" in told("variants.regmean.merge.parameters.floor=1")
    assert "'fisher' takes statistics of the models on one" in told(without="corpus:")
