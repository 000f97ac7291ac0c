"""What is written comes back: integers exactly, log-probabilities within 0.02 nats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.codec import NOTHING, STEP, Distribution, decode, encode


def drawn(seed: int, count: int, kept: int, vocabulary: int, sharpness: float) -> Distribution:
    """Rows of every kind: flat, sharp, nearly certain."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(count, 4 * kept + 1)) * sharpness
    logprobs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    logprobs = -np.sort(-logprobs, axis=1)
    pieces = np.sort(generator.integers(0, 3, count))
    pieces = np.unique(pieces, return_inverse=True)[1]
    widths = generator.integers(0, 9, count)
    ends = np.concatenate([np.cumsum(widths[pieces == p]) for p in range(pieces.max() + 1)])
    gold = np.where(generator.random(count) < 0.1, np.nan, logprobs[:, -1])
    return Distribution(
        pieces,
        ends,
        generator.integers(0, vocabulary, (count, kept)),
        logprobs[:, :kept],
        np.logaddexp.reduce(logprobs[:, kept:], axis=1),
        gold,
    )


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 40),
    kept=st.integers(1, 20),
    vocabulary=st.sampled_from([100, 65_536, 65_537, 262_144]),
    sharpness=st.sampled_from([0.01, 1.0, 5.0, 25.0]),
)
def test_integers_come_back_and_errors_stay_small(
    seed: int, count: int, kept: int, vocabulary: int, sharpness: float
) -> None:
    rows = drawn(seed, count, kept, vocabulary, sharpness)
    content, size = encode(rows, vocabulary)
    found = decode(content, size, vocabulary)
    for name in ("pieces", "ends", "ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))
    for name in ("logprobs", "log_tail", "gold_logprob"):
        np.testing.assert_allclose(getattr(found, name), getattr(rows, name), atol=0.02)
    total = np.exp(found.logprobs).sum(axis=1) + np.exp(found.log_tail)
    np.testing.assert_allclose(total, 1.0, atol=1e-12)
    assert (np.diff(found.logprobs, axis=1) <= 0).all()


def test_impossible_tokens_are_written_as_very_unlikely() -> None:
    rows = drawn(1, 3, 4, 100, 1.0)
    rows.logprobs[1] = [0.0, -np.inf, -np.inf, -np.inf]
    found = decode(*encode(rows, 100), 100)
    assert found.logprobs[1, 1] < -900
    assert -np.log(np.exp(rows.logprobs[1]).sum()) == pytest.approx(0)
    assert found.logprobs.min() > -NOTHING * STEP
