"""pass@k and clustered errors against statsmodels and counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st

from reports.passes import pass_at_k, pass_rate, standard_error


def test_two_right_of_five_pass_at_three_nine_times_of_ten() -> None:
    assert pass_at_k([5], [2], 3)[0] == pytest.approx(0.9)


@given(n=st.integers(1, 7), data=st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    found = pass_at_k([n, n], [c, n], k)
    assert found == pytest.approx([sum(map(any, draws)) / len(draws), 1.0], abs=1e-12)


def test_the_clustered_error_is_that_of_statsmodels() -> None:
    g = np.random.default_rng(1)
    cluster = g.integers(0, 12, 90)
    values = (g.random(90) + g.random(12)[cluster] > 1).astype(float)
    fit = sm.OLS(values, np.ones(90)).fit(cov_type="cluster", cov_kwds={"groups": cluster})
    assert standard_error(values, cluster) == pytest.approx(fit.bse[0])
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / np.sqrt(90))
    assert standard_error([1.0, 0.0], ["a", "a"]) is None
    with pytest.raises(ValueError, match="NaN"):
        standard_error([1.0, np.nan])


def test_the_error_of_pass_at_k_is_over_problems() -> None:
    samples, right = [20, 20, 20, 20], [0, 5, 20, 1]
    found = pass_rate(samples, right, 10)
    values = pass_at_k(samples, right, 10)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / 2)
    assert found.low is not None
    assert found.low < found.value
    joined = pass_rate(samples, right, 10, clusters=["a", "a", "b", "b"])
    assert joined.clusters == 2
    # One greedy sample a problem is a proportion: Wilson, which is no point at zero.
    greedy = pass_rate([1] * 50, [0] * 50, 1)
    assert (greedy.value, greedy.low) == (0, 0)
    assert greedy.high == pytest.approx(0.0713, abs=1e-3)


@pytest.mark.parametrize(("samples", "right", "k"), [([4], [5], 1), ([4], [2], 5), ([], [], 1)])
def test_impossible_counts_are_refused(samples: list, right: list, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(samples, right, k)


def test_intervals_of_pass_at_k_cover_ninety_five_percent() -> None:
    """4000 sets of 164 problems of unlike difficulty; standard error 0.35 points, bound 1."""
    g = np.random.default_rng(12)
    truth = float(np.mean(1 - (1 - g.beta(0.6, 1.2, 400_000)) ** 5))
    covered = 0
    for _ in range(4000):
        right = g.binomial(20, g.beta(0.6, 1.2, 164))
        found = pass_rate(np.full(164, 20), right, 5)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    assert covered / 4000 == pytest.approx(0.95, abs=0.01)
