"""That the parity check finds what is unlike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.evaluate import load
from harness.parity import _choices, _texts, flipped
from harness.scoring import SharedPrefixLM, stock


class Off:
    """A model whose first answer of every batch is off by some nats, or some characters."""

    def __init__(self, lm: Any, nats: float) -> None:
        self.lm, self.nats = lm, nats

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
        (total, greedy), *rest = self.lm.loglikelihood(requests, disable_tqdm=True)
        return [(total + self.nats, greedy), *rest]

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        text, *rest = self.lm.generate_until(requests, disable_tqdm=True)
        return [text + " ", *rest]


def test_like_models_pass_and_one_answer_that_is_off_does_not(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    ours, theirs = SharedPrefixLM(str(tiny["llama"])), stock(str(tiny["llama"]), "cpu")
    items = load("tiny_choice", tmp_path, None, 17).items
    said, right = _choices(ours, theirs, items)
    assert right
    assert f"{sum(len(item.requests) for item in items)} requests" in said
    assert "0 flips" in said
    said, right = _choices(Off(ours, 0.0011), theirs, items)
    assert not right
    assert "1.1e-03 nats apart" in said
    said, right = _choices(Off(ours, 50.0), theirs, items)
    assert not right
    assert "1 flips" in said
    prompts = load("tiny_generate", tmp_path, None, 17).items
    assert _texts(ours, theirs, prompts, 5)[1]
    said, right = _texts(Off(ours, 0.0), theirs, prompts, 5)
    assert not right
    assert f"{len(prompts) - 1} texts equal" in said


@pytest.mark.parametrize(
    ("mine", "other", "flips"),
    [
        ([-1.0, -2.0], [-1.0, -2.0], False),
        ([-1.0, -2.0], [-2.0, -1.0], True),
        ([-1.0, -1.0005], [-1.0005, -1.0], False),  # a tie within what both may be off
        ([-1.0, -1.003], [-1.003, -1.0], True),
    ],
)
def test_a_flip_is_one_only_beyond_a_tie(
    mine: list[float], other: list[float], flips: bool
) -> None:
    assert flipped(np.array(mine), np.array(other), np.ones(2)) is flips
    # Divided by ten characters, the same values.
    assert flipped(np.array(mine) / 10, np.array(other) / 10, np.full(2, 10.0)) is flips
