"""Ensemble rules: weights from what a prompt is worth, and sums over chunks and votes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.mixing import evidence, mix_chunks, mixture, vote
from harness.rules import ENSEMBLE_RULES, MIXINGS, Weighing, mixing, packllm_opt, problems

RULES = pytest.mark.parametrize("rule", ENSEMBLE_RULES)


@RULES
def test_weights_are_a_distribution_and_follow_the_prompt(rule: str) -> None:
    for bits in (np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0]), np.array([5.0])):
        weights = ENSEMBLE_RULES[rule](bits)
        assert weights.sum() == pytest.approx(1)
        assert (weights >= 0).all()
        assert (np.diff(weights) <= 0).all()


@RULES
def test_every_rule_says_what_it_mixes(rule: str) -> None:
    found = str(mixing(rule))
    assert "scoring" in found
    assert "generation" in found
    assert set(MIXINGS) <= set(ENSEMBLE_RULES)


def test_mixing_levels_are_named_and_differ() -> None:
    said = {str(mixing("mean_probability", level)) for level in ("chunk", "sequence", "byte")}
    assert len(said) == 3


CHUNKS = st.lists(
    st.lists(st.floats(-9, -0.01), min_size=4, max_size=4), min_size=2, max_size=4
).map(np.array)


def found_bits(chunks: np.ndarray, w: np.ndarray) -> float:
    """Nats of the prompt under the mixture, added up one chunk at a time."""
    total = 0.0
    for c in range(chunks.shape[1]):
        total -= math.log(sum(w[j] * math.exp(chunks[j, c]) for j in range(len(w))))
    return total


@given(CHUNKS)
def test_optimised_weights_are_never_worse_than_the_best_member(chunks: np.ndarray) -> None:
    bits = -chunks.sum(axis=1)
    w = packllm_opt(bits, chunks)
    assert w.sum() == pytest.approx(1)
    assert found_bits(chunks, w) <= bits.min() + 1e-9


@given(CHUNKS)
def test_optimised_weights_of_two_are_the_best_of_their_grid(chunks: np.ndarray) -> None:
    two = chunks[:2]
    w = packllm_opt(-two.sum(axis=1), two)
    tried = [found_bits(two, np.array([1 - a / 20, a / 20])) for a in range(21)]
    assert found_bits(two, w) == pytest.approx(min(tried), abs=1e-9)


def test_optimised_weights_use_a_member_that_knows_what_the_best_does_not() -> None:
    # The best member but for one chunk, where the other is sure: half of each is better than all.
    chunks = np.log([[0.9, 0.9, 0.01], [0.2, 0.2, 0.9]])
    w = packllm_opt(-chunks.sum(axis=1) / 3, chunks)
    assert 0.2 < w[1] < 0.8


def test_chunks_are_mixed_between_common_ends() -> None:
    one = np.log([0.5, 0.5, 0.2])
    two = np.log([0.1, 0.4])
    ends = [np.array([1, 2, 4]), np.array([2, 4])]
    expected = np.log(0.5 * 0.25 + 0.5 * 0.1) + np.log(0.5 * 0.2 + 0.5 * 0.4)
    assert mix_chunks([one, two], ends, np.array([0.5, 0.5])) == pytest.approx(expected)
    # No end in common but the last: the whole is one chunk.
    ends = [np.array([1, 2, 4]), np.array([3, 4])]
    expected = np.log(0.5 * 0.05 + 0.5 * 0.04)
    assert mix_chunks([one, two], ends, np.array([0.5, 0.5])) == pytest.approx(expected)


def test_a_mixture_of_one_or_of_equals_is_that_to_the_bit() -> None:
    x = np.array([-1.1, -700.3, -0.0])
    assert (mixture(np.stack([x, x - 1]), np.array([1.0, 0.0])) == x).all()
    assert (mixture(np.stack([x, x]), np.array([0.5, 0.5])) == x).all()


def test_a_prompt_counts_only_where_all_members_predict_it() -> None:
    # Ends of "ab cd ef"; the second has no token before its first, so nothing predicts "ab".
    ends = [np.array([2, 5, 8]), np.array([2, 8])]
    bits, chunks = evidence([np.log([0.5, 0.5, 0.25]), np.log([0.5])], ends)
    assert chunks == pytest.approx(np.log([[0.125], [0.5]]))
    assert bits == pytest.approx([3 / 6, 1 / 6])
    # Cut from the left to its last token, which no other end is before: nothing is left to compare.
    bits, chunks = evidence([np.log([0.25]), np.log([0.5])], [np.array([3, 8]), np.array([5, 8])])
    assert not chunks.size
    assert not bits.any()
    # All predict from the first byte on.
    bits, chunks = evidence([np.log([0.5, 0.5]), np.log([0.25])], [np.array([1, 4]), np.array([4])])
    assert bits == pytest.approx([0.5, 0.5])


def test_level_votes_go_to_the_likelier_choice() -> None:
    totals = np.log([[0.5, 0.1], [0.2, 0.3]])
    assert vote(totals, np.array([0.5, 0.5]), [4, 4]).tolist() == [1, 0]
    assert vote(totals, np.array([0.4, 0.6]), [4, 4]).tolist() == [0, 1]
    three = np.log([[0.5, 0.1, 0.1], [0.2, 0.3, 0.2]])
    assert vote(three, np.full(3, 1 / 3), [4, 4]) == pytest.approx([0, 0.5, 0.5])


def test_settings_of_a_rule_are_checked() -> None:
    assert problems("packllm_sim", {"temperature": 0.0}, 2, None, None) == [
        ("parameters", "temperature 0: should be above 0")
    ]
    assert problems("packllm_opt", {"step": 2.0}, 2, None, None)[0][0] == "parameters"
    assert problems("mean_logit", {}, 2, None, "chunk")[0][0] == "level"
    assert not problems("packllm_opt", {"step": 0.1}, 2, [0.25, 0.75], "byte")


def test_given_weights_multiply_what_a_rule_finds() -> None:
    weigh = Weighing("packllm_sim", {}, 3, [0.5, 0.5, 0.0])
    bits = np.array([1.0, 2.0, 0.1])
    odds = np.exp(-bits[:2])
    assert weigh(bits) == pytest.approx([*(odds / odds.sum()), 0.0])
