"""WIDEN by hand, and over the columns of a tensor that comes in pieces."""

from __future__ import annotations

import math

import torch

from fusion.columns import widen


def test_widen_by_hand() -> None:
    """Two columns; the first model turns the second one, the other makes the first longer."""
    base = torch.eye(2)
    one, two = torch.tensor([[1.0, 1.0], [0, 0]]), torch.tensor([[3.0, 0], [0, 1]])
    # Ranks of the first: norm 0 0.5 (ties: the first lower), direction 0 0.5. The other: norm
    # 0.5 0 and direction 0 0.5. Mean rank 0.25, so ranks of 0.5 weigh 1, others their softmax.
    low = math.exp(0) / (math.exp(0) + math.exp(0.5))
    weight_one = [(low + 0.5) / 2, 1.0]
    weight_two = [(1 + 0.5) / 2, (low + 1) / 2]
    expected = (
        base + (one - base) * torch.tensor(weight_one) + (two - base) * torch.tensor(weight_two)
    )
    torch.testing.assert_close(widen([one, two], base), expected)
    # Rows of an embedding are what its columns would be.
    found = widen([one.T, two.T], base, name="model.embed_tokens.weight")
    torch.testing.assert_close(found, expected.T)
    assert not torch.equal(widen([one.T, two.T], base), expected.T)
    # The least of all changes is ranked 0 and never above the mean: half the softmax each.
    assert widen([one, two], base, ratio=10.0)[0, 0] < expected[0, 0]


def test_widen_weighs_an_element_of_a_vector_by_its_own_change() -> None:
    base = torch.zeros(2)
    one, two = torch.tensor([0.1, 0.3]), torch.tensor([0.5, 0.1])
    low = math.exp(0.1) / (math.exp(0.1) + math.exp(0.5))
    second = math.exp(0.1) / (math.exp(0.1) + math.exp(0.3))
    expected = torch.tensor([low * 0.1 + 0.5, 0.3 + second * 0.1])
    torch.testing.assert_close(widen([one, two], base), expected)
