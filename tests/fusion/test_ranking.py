"""The smallest kept number, against sorting: ties, samples that mislead, pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion import ranking
from fusion.ranking import Least, Ranked, least_kept
from fusion.tensors import Changes, summed


class Rows:
    """One tensor of numbers in pieces of eight, whose sample is what one says it is."""

    def __init__(self, numbers: Tensor, sample: Tensor) -> None:
        self.numbers, self.told, self.size = numbers, sample, numbers.numel()

    def __iter__(self) -> Iterator[tuple[str, list[Tensor], None]]:
        for piece in self.numbers.split(8):
            yield "x", [piece], None

    def map(self, work: Callable[..., Any]) -> Iterator[Any]:
        for number, piece in enumerate(self.numbers.split(8)):
            yield work(8 * number, "x", [piece], None)

    def sample(self, _: int) -> list[tuple[str, list[Tensor], None]]:
        return [("x", [self.told], None)]


def values(models: Any, _: Any) -> list[Ranked]:
    return [(models[0].numpy(), None)]


def kept(least: Least, numbers: Tensor, start: int = 0) -> np.ndarray:
    """What of a piece is kept, as merge methods take it."""
    rooms, ones = [least.of(start)], np.ones(numbers.numel(), np.float32)
    parts = Changes((ones,), None, numbers.numpy(), [least.value], rooms)
    return summed(parts, [1.0]) > 0


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(20, 300),
    share=st.floats(0.01, 1),
    steps=st.sampled_from([2, 5, 10**6]),
    sample=st.sampled_from(["honest", "low", "high", "all"]),
)
def test_what_is_kept_is_what_sorting_keeps(
    seed: int, count: int, share: float, steps: int, sample: str
) -> None:
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, steps, (count,), generator=g) / steps
    told = {"honest": numbers[::3], "low": numbers * 0 + 0.01, "high": numbers * 0 + 2,
            "all": numbers}[sample]  # fmt: skip
    keep = max(1, int(share * count))
    before = ranking.SAMPLE
    ranking.SAMPLE = (1, 4)
    try:
        (least,) = least_kept(Rows(numbers, told), values, lambda n, _: max(1, int(share * n)))
    finally:
        ranking.SAMPLE = before
    pieces = list(enumerate(numbers.split(8)))
    mask = np.concatenate([kept(least, piece, 8 * at) for at, piece in pieces])
    first = sorted(range(count), key=lambda i: (-float(numbers[i]), i))[:keep]
    assert mask.nonzero()[0].tolist() == sorted(first)


@pytest.mark.parametrize("keep", [0, 3])
def test_nothing_and_everything(keep: int) -> None:
    numbers = torch.tensor([1.0, 0.0, 2.0])
    (least,) = least_kept([("x", [numbers], None)], values, lambda *_: keep)
    assert kept(least, numbers).tolist() == [bool(keep)] * 3


def test_a_sample_of_one_number_is_no_bracket() -> None:
    numbers = torch.tensor([2.0] * 10 + [1.0] * 20 + [0.5] * 70)
    before = ranking.SAMPLE
    ranking.SAMPLE = (1, 4)
    try:
        (least,) = least_kept(Rows(numbers, torch.ones(1000)), values, lambda n, _: n * 35 // 100)
    finally:
        ranking.SAMPLE = before
    assert least.value == 0.5


@pytest.mark.parametrize("keep", [1, 3, 5, 7])
def test_what_is_no_number_is_kept(keep: int) -> None:
    numbers = torch.tensor([1.0, 1.0, float("nan"), 2.0, 1.0, 2.0, 0.5, float("nan")])
    (least,) = least_kept([("x", [numbers], None)], values, lambda *_: keep)
    mask = kept(least, numbers)
    assert mask[[2, 7]].all()
    assert mask.sum() >= keep
