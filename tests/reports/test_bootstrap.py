"""BCa against scipy, and how often its intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from reports.bootstrap import acceleration, limits
from reports.statistics import paired_bootstrap, sign_flip


def strata(*values: np.ndarray) -> list[np.ndarray]:
    return [np.stack([v, np.ones(len(v))], axis=1) for v in values]


def test_bca_is_scipys_for_a_stratified_mean() -> None:
    g = np.random.default_rng(2)
    one, two = g.exponential(1.0, 150), g.exponential(0.5, 200)

    def mean(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return (x.mean(axis=axis) + y.mean(axis=axis)) / 2

    expected = scipy.stats.bootstrap(
        (one, two), mean, n_resamples=60_000, method="BCa", rng=3, vectorized=True
    ).confidence_interval
    found = limits(strata(one, two), np.random.default_rng(4), 60_000, 0.95, "bca")
    # Monte Carlo noise of both, and n against n − 1 of n drawn: under 2 % of the width of 0.165.
    assert found == pytest.approx((expected.low, expected.high), abs=0.003)
    plain = limits(strata(one, two), np.random.default_rng(4), 60_000, 0.95)
    assert plain[1] is not None
    assert found[1] > plain[1]  # skewed to the right, so the upper limit moves out


def test_the_acceleration_is_that_of_a_jackknife_by_hand() -> None:
    values = [0.0, 0.1, 0.3, 2.0]
    left = [(sum(values) - v) / 3 for v in values]
    middle = sum(left) / 4
    cubes = sum((middle - x) ** 3 for x in left)
    squares = sum((middle - x) ** 2 for x in left)
    expected = cubes / (6 * squares**1.5)
    found = acceleration([(strata(np.array(values))[0], 1.0)])
    assert found == pytest.approx(expected)


def test_nothing_that_varies_gives_no_interval() -> None:
    assert limits(strata(np.ones(5)), np.random.default_rng(1), 1000, 0.95, "bca") == (None, None)
    assert limits(strata(np.ones(1)), np.random.default_rng(1), 1000, 0.95, "bca") == (None, None)


def test_intervals_of_a_macro_gain_cover_ninety_five_percent() -> None:
    """2500 comparisons over two tasks of right and wrong: standard error 0.4 points, bound 1."""
    g = np.random.default_rng(8)
    shares = ([0.12, 0.05, 0.83], [0.05, 0.10, 0.85])
    truth = ((0.12 - 0.05) + (0.05 - 0.10)) / 2
    covered = 0
    for _ in range(2500):
        tasks = []
        for n, share in zip((300, 150), shares, strict=True):
            better, worse, _same = g.multinomial(n, share)
            values = np.zeros(n)
            values[:better], values[better : better + worse] = 1.0, -1.0
            tasks.append(values)
        low, high = limits(strata(*tasks), g, 1000, 0.95, "bca")
        assert low is not None
        assert high is not None
        covered += low <= truth <= high
    assert covered / 2500 == pytest.approx(0.95, abs=0.01)


def test_equal_rows_are_called_different_at_most_one_time_in_twenty() -> None:
    """400 comparisons of clustered items; 5 % and two standard errors of 1.1 points."""
    g = np.random.default_rng(9)
    rejected = 0
    for _ in range(400):
        cluster = np.repeat(np.arange(40), 5)
        shared = np.repeat(g.choice([-1.0, 0, 1.0], 40, p=[0.1, 0.8, 0.1]), 5)
        values = shared * g.integers(0, 2, 200)
        found = paired_bootstrap(values, np.zeros(200), g, clusters=cluster)
        rejected += found.p_value < 0.05
    assert rejected / 400 <= 0.072


def test_the_permutation_test_of_continuous_scores_keeps_its_level() -> None:
    """1000 comparisons of 30 skewed items; 5 % and two standard errors of 0.7 points."""
    g = np.random.default_rng(10)
    values = g.exponential(1.0, (1000, 30)) * g.choice([-1.0, 1.0], (1000, 30))
    rejected = sum(sign_flip(line, g, 999) < 0.05 for line in values)
    assert 0.036 <= rejected / 1000 <= 0.064
