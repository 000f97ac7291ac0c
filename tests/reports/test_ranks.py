"""Tests between all rows of a board."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from reports.ranks import Task, letters, pairwise


@given(st.integers(0, 7), st.integers(0, 6))
def test_for_right_and_wrong_items_it_is_the_exact_mcnemar_test(one: int, other: int) -> None:
    first = np.r_[np.ones(one), np.zeros(other), np.ones(20)]
    second = np.r_[np.zeros(one), np.ones(other), np.ones(20)]
    p = pairwise([Task(np.stack([first, second]), np.ones(len(first)))])
    expected = binomtest(one, one + other).pvalue if one + other else 1.0
    assert p[0, 1] == p[1, 0] == pytest.approx(expected)


def test_equal_rows_are_told_apart_at_most_one_time_in_twenty() -> None:
    g = np.random.default_rng(5)
    rejected = 0
    for _ in range(400):
        values = (g.random((2, 300)) < 0.5).astype(float)
        rejected += pairwise([Task(values, np.ones(300))])[0, 1] < 0.05
    assert rejected <= 400 * 0.05 + 2 * np.sqrt(400 * 0.05 * 0.95)


def test_letters_join_what_no_test_tells_apart() -> None:
    p = np.array([[1, 1, 0.001], [1, 1, 1], [0.001, 1, 1]])
    assert letters(p, [0, 1, 2]) == ["a", "ab", "b"]
    assert letters(np.ones((2, 2)), [1, 0]) == ["a", "a"]
