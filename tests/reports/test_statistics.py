"""Statistics against scipy, statsmodels and published figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, t, ttest_1samp, ttest_ind
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from reports.statistics import (
    holm,
    macro,
    macro_interval,
    mcnemar,
    minimum_detectable_effect,
    paired_bootstrap,
    score_interval,
    wilson,
)

# Percent, as published with FuseLLM-7B: ARC-e, ARC-c, BoolQ, HellaSwag, OpenBookQA.
LLAMA2, FUSED = (74.58, 46.33, 77.71, 76.00, 44.20), (75.04, 47.44, 78.13, 76.78, 45.40)


def generator() -> np.random.Generator:
    return np.random.default_rng(3)


def test_commonsense_is_the_unweighted_mean_of_its_five_tasks() -> None:
    assert macro(LLAMA2) == pytest.approx(63.76, abs=0.005)
    assert macro(FUSED) == pytest.approx(64.56, abs=0.005)


@settings(deadline=None)
@given(n=st.integers(1, 300), share=st.floats(0, 1))
def test_wilson_is_statsmodels_and_never_a_point(n: int, share: float) -> None:
    k = round(n * share)
    low, high = wilson(k, n)
    expected = proportion_confint(k, n, method="wilson")
    assert (low, high) == pytest.approx(expected, abs=1e-12)
    assert 0 <= low <= k / n <= high <= 1
    assert high > low


@settings(deadline=None)
@given(b=st.integers(0, 40), c=st.integers(0, 40))
def test_exact_mcnemar_is_statsmodels(b: int, c: int) -> None:
    found = mcnemar(b, c)
    if b + c:
        table = [[5, b], [c, 5]]
        assert found.p_exact == pytest.approx(reference_mcnemar(table, exact=True).pvalue)
        assert found.p_exact == pytest.approx(binomtest(b, b + c).pvalue, abs=1e-9)
    assert 0 < found.p_mid <= found.p_exact <= 1


@pytest.mark.parametrize("gain", [0.0, 0.2, 3.0])
def test_what_items_can_show_does_not_grow_with_the_gain_that_was_found(gain: float) -> None:
    difference = gain + generator().normal(0, 0.1, 80)
    found = paired_bootstrap(difference, np.zeros(80), generator())
    known = ttest_1samp(difference, 0)._standard_error * t.ppf(0.975, 79) / norm.ppf(0.975)
    assert np.sqrt(found.null_variance) == pytest.approx(known)
    tasks = np.repeat([0, 1], [30, 50])
    each = [ttest_1samp(d, 0)._standard_error for d in np.split(difference, [30])]
    two = paired_bootstrap(difference, np.zeros(80), generator(), tasks=tasks)
    welch = ttest_ind(difference[:30], difference[30:], equal_var=False).df  # Satterthwaite's
    grown = t.ppf(0.975, welch) / norm.ppf(0.975)
    assert np.sqrt(two.null_variance) == pytest.approx(grown * np.hypot(*each) / 2)
    # Right/wrong tasks beside others keep their own variance.
    mixed = paired_bootstrap(
        np.r_[difference[:30], np.ones(10), np.zeros(40)], np.zeros(80), generator(), tasks=tasks
    )
    expected = np.hypot(each[0], (0.2 / 50) ** 0.5) / 2
    assert np.sqrt(mixed.null_variance) == pytest.approx(expected, rel=1e-3)


def test_two_or_three_items_show_nothing_small() -> None:
    found = paired_bootstrap([-0.049, -0.051], [0.0, 0.0], generator())
    low, high = ttest_1samp([-0.049, -0.051], 0).confidence_interval(0.95)
    assert 1.959964 * np.sqrt(found.null_variance) == pytest.approx((high - low) / 2)
    same = paired_bootstrap(np.full(80, 0.3), np.full(80, 0.1), generator())
    assert same.null_variance == 0  # not what rounding leaves


@pytest.mark.parametrize("gain", [0.0, 0.1, 0.3])
def test_passages_of_questions_do_not_add_the_gain_to_their_variance(gain: float) -> None:
    draws = np.random.default_rng(5)
    worse, better = 0.15 - gain / 2, 0.15 + gain / 2
    signs = draws.choice([-1.0, 0.0, 1.0], 2000, p=[worse, 0.7, better])
    found = paired_bootstrap(signs, np.zeros(2000), draws, clusters=np.repeat(np.arange(100), 20))
    assert np.sqrt(found.null_variance) == pytest.approx(np.sqrt(0.3 / 2000), rel=0.15)


def test_a_gain_of_that_size_shows_in_four_runs_of_five() -> None:
    draws = np.random.default_rng(11)
    shown = []
    for _ in range(300):
        noise = draws.normal(0, 1, 40)
        least = minimum_detectable_effect(1.0, 40)
        found = paired_bootstrap(noise + least, np.zeros(40), draws, method="percentile")
        shown.append(found.p_value < 0.05)
    assert np.mean(shown) == pytest.approx(0.8, abs=0.07)  # three standard errors of 300 runs


def test_right_or_wrong_items_that_differ_one_way_only_still_have_mcnemars_variance() -> None:
    found = paired_bootstrap(np.ones(50), np.repeat([0.0, 1.0], [10, 40]), generator())
    assert found.null_variance == pytest.approx(0.2 / 50)
    alone = paired_bootstrap([0.7, 0.9], [0.5, 0.4], generator(), tasks=[0, 1])
    assert alone.null_variance == pytest.approx((0.2**2 + 0.5**2) / 4)  # a task of one item


def test_six_discordant_items_of_six_are_the_least_that_count() -> None:
    assert mcnemar(6, 0).p_exact == pytest.approx(0.03125)
    assert mcnemar(5, 0).p_exact > 0.05


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels(values: list[float]) -> None:
    assert holm(values) == pytest.approx(multipletests(values, method="holm")[1])


@pytest.mark.parametrize(
    ("n", "share", "percent"),
    [(6511, 0.05, 0.78), (2376, 0.05, 1.29), (1172, 0.1, 2.59), (164, 0.05, 4.9), (500, 0.1, 4.0)],
)
def test_detectable_effects_of_the_papers_suites(n: int, share: float, percent: float) -> None:
    assert 100 * minimum_detectable_effect(share, n) == pytest.approx(percent, rel=0.02)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_the_gain_is_the_macro_mean_of_weighted_task_means(seed: int) -> None:
    g = np.random.default_rng(seed)
    tasks = np.repeat(["a", "b"], [7, 20])
    one, two, weights = g.random(27), g.random(27), g.uniform(0.5, 3, 27)
    found = paired_bootstrap(one, two, generator(), tasks=tasks, weights=weights)
    expected = np.mean(
        [np.average((one - two)[tasks == t], weights=weights[tasks == t]) for t in ("a", "b")]
    )
    assert found.gain == pytest.approx(expected)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.gain <= found.high
    turned = paired_bootstrap(two, one, generator(), tasks=tasks, weights=weights)
    assert turned.gain == pytest.approx(-found.gain)


def test_equal_rows_tell_nothing() -> None:
    ones = np.ones(12)
    found = paired_bootstrap(ones, ones, generator())
    assert (found.gain, found.p_value, found.low) == (0, 1, None)


def test_one_discordant_item_is_not_significant() -> None:
    one, two = np.zeros(50), np.zeros(50)
    one[7] = 1
    assert paired_bootstrap(one, two, generator()).p_value == 1


def test_items_scored_on_one_side_only_are_left_out() -> None:
    one, two = np.array([1.0, np.nan, 0.5]), np.array([0.0, 1.0, 0.5])
    assert paired_bootstrap(one, two, generator()).n == 2
    with pytest.raises(ValueError, match="no item"):
        paired_bootstrap([np.nan], [1.0], generator())


def test_intervals_of_scores() -> None:
    values = np.array([1, 0, 1, 1, 0, 1, 1, 1.0])
    assert score_interval(values, generator()) == pytest.approx(wilson(6, 8))
    low, high = score_interval(np.linspace(0.8, 1.2, 30), generator()) or (0, 0)
    assert low < 1.0 < high
    assert macro_interval([0.5, 0.7], [(0.4, 0.6), None]) is None
    low, high = macro_interval([0.5, 0.7], [(0.4, 0.6), (0.6, 0.8)]) or (0, 0)
    assert (low, high) == pytest.approx((0.6 - 0.0707107, 0.6 + 0.0707107), abs=1e-6)
