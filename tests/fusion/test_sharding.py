"""How processes share a model: what names and files say, and what each then keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion.errors import RecipeError, RunError
from fusion.sharding import DEEPSPEED, SHARDINGS, deepspeed_config, kept, sharding
from harness.recipe import parse

TEXT = """
sources: {llama: {path: "tiny:llama"}}
evaluate: {suites: [tiny_choice]}
reference: llama
machine: MACHINE
"""


def test_names_are_configurations_that_leave_the_rest_to_the_recipe() -> None:
    for name in DEEPSPEED:
        found = deepspeed_config(name)
        assert found is not None
        assert not {"optimizer", "scheduler"} & found.keys()
        assert sharding(name, False) == name
    assert deepspeed_config(None) is None
    assert sharding(None, False) == "none"
    assert sharding(None, True) == "fsdp"


def test_a_files_optimizer_and_schedule_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    content = {"zero_optimization": {"stage": 2}, "optimizer": {}, "scheduler": {}}
    path.write_text(json.dumps(content))
    assert deepspeed_config(str(path)) == {"zero_optimization": {"stage": 2}}
    assert sharding(str(path), False) == "zero2"


@pytest.mark.parametrize("text", ['{"zero', "[1]", None])
def test_what_is_no_configuration_is_told_with_what_is(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "own.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RunError, match="neither one of zero2, zero3, zero3_offload nor a file"):
        deepspeed_config(str(path))


def test_what_a_device_keeps_is_as_in_figure_1_of_zero() -> None:
    """7.5 billion weights, 64 processes, half precision: 120, 16.6 and 1.9 GB."""
    figures = {"none": 120, "zero2": 16.6, "zero3": 1.9, "fsdp": 1.9, "zero3_offload": 0}
    assert set(figures) == set(SHARDINGS)
    for how, gigabytes in figures.items():
        assert kept(7_500_000_000, how, 64, 2) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ("{deepspeed: zero4}", "'zero4' is no file and none of zero2"),
        ("{fsdp: true}", "one process has nobody to share with"),
        ("{fsdp: true, processes: 2, deepspeed: zero3}", "leave out one of them"),
    ],
)
def test_mistakes_of_a_recipe(machine: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse(TEXT.replace("MACHINE", machine), "r")
    parse(TEXT.replace("MACHINE", "{fsdp: true, processes: 2}"), "r")


def test_processes_that_cannot_share_a_step_evenly_are_a_mistake() -> None:
    text = TEXT.replace("MACHINE", "{processes: 3}").replace(
        "evaluate:",
        "corpus: {path: x, blocks: 64, tokens: 99}\n"
        "variants: {clm: {train: {init: llama}}, more: {train: {init: llama, batch_blocks: 12}}}\n"
        "evaluate:",
    )
    said = (
        r"machine.processes +3 cannot share evenly the 16 blocks .*clm.*; allowed: 1, 2, 4, 8, 16"
    )
    with pytest.raises(RecipeError, match=said) as caught:
        parse(text, "r")
    assert "1 problem" in str(caught.value)  # a step of twelve blocks can be shared by three
    parse(text, "r", ["machine.processes=4"])
