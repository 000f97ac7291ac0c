"""The same weights measured once more: what arithmetic alone moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.errors import RecipeError
from harness.build import build
from harness.measuring import Measuring, measure_rows
from harness.plan import plan
from harness.recipe import parse
from harness.run import pending
from reports.records import Run, read_primary, read_samples
from reports.signature import differences

TEXT = """
sources: {llama: {path: "tiny:llama"}}
variants:
  again: {repeat: {row: llama}}
evaluate: {suites: [tiny_choice, tiny_generate]}
reference: llama
machine: {device: cpu, batch_tokens: 64, generate_rows: 4}
"""


def test_the_same_weights_give_the_same_answers_in_smaller_batches(home: Path) -> None:
    planned = plan(parse(TEXT, "r"), home)
    build(planned, planned.recipe.rows)
    planned = plan(planned.recipe, home)
    assert not pending(planned, ["again"], ("build",))
    opened = [Measuring(planned)._open(row) for row in ("llama", "again")]
    assert [model.batch_tokens for model in opened] == [64, 32]
    assert [model.generate_rows for model in opened] == [4, 2]
    rows = planned.recipe.rows
    assert not measure_rows(planned, {row: planned.evaluations(row) for row in rows})
    for one, other in zip(*map(planned.evaluations, rows), strict=True):
        runs = [Run.open(step.folder) for step in (one, other)]
        first, second = (read_primary(run).sort_values(["task", "doc_id"]) for run in runs)
        assert list(first.value) == list(second.value)
        likely = [read_samples(run).set_index(["task", "doc_id"]).choice_ll for run in runs]
        for key, values in likely[0].items():
            assert likely[1][key] == pytest.approx(values, abs=1e-4)


def test_a_repeat_is_measured_by_the_backend_of_the_row_that_it_repeats(home: Path) -> None:
    hf = ["evaluate.backend=hf", "evaluate.suites=[tiny_choice]", "evaluate.limit=4"]
    planned = plan(parse(TEXT, "r", hf), home)
    build(planned, ["llama"])
    one, other = (planned.evaluations(row)[0] for row in ("llama", "again"))
    assert one.content["backend"] == other.content["backend"] == "hf"
    opened = [Measuring(planned)._open(row) for row in ("llama", "again")]
    assert [model.lm.batch_size for model in opened] == [16, 8]
    assert not measure_rows(planned, {"llama": [one], "again": [other]})
    first, second = (Run.open(step.folder).manifest for step in (one, other))
    assert differences(second, first) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.backend=vllm", r"variants\.again\.repeat +backend vllm forms its batches"),
        ("variants.again.repeat.row=lama", "'lama' is no row here"),
        ("variants.twice={repeat: {row: again}}", "no such row to override"),
        ("variants.again.repeat={}", "missing"),
    ],
)
def test_what_cannot_be_repeated_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(TEXT, "r", [override])


def test_a_repeat_is_no_ingredient_and_repeats_no_repeat() -> None:
    text = TEXT.replace("evaluate:", "  twice: {repeat: {row: again}}\nevaluate:")
    with pytest.raises(RecipeError, match="'again' is a repeat"):
        parse(text, "r")
