"""Decisions with a third outcome, their error rates and their power."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import pytest
from scipy.stats import binom, norm
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

from reports.discordance import tango
from reports.gate import FAILING
from reports.gates import (
    chance_to_pass,
    equivalent,
    non_inferior,
    smallest_margin,
    superior,
    verdict,
)


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.01, 0.03, "pass"),
        (-0.05, 0.03, "inconclusive"),
        (-0.05, -0.03, "fail"),
        (-0.02, 0.0, "inconclusive"),
    ],
)
def test_non_inferiority_has_three_outcomes(low: float, high: float, outcome: str) -> None:
    assert non_inferior(low, high, 0.02) == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(-0.01, 0.01, "pass"), (-0.01, 0.03, "inconclusive"), (0.03, 0.05, "fail")],
)
def test_equivalence_has_three_outcomes(low: float, high: float, outcome: str) -> None:
    assert equivalent(low, high, 0.02) == outcome
    assert equivalent(-high, -low, 0.02) == outcome


def test_superiority_and_verdicts() -> None:
    assert [superior(g, p) for g, p in ((0.1, 0.01), (-0.1, 0.01), (0.1, 0.2), (0, 0.01))] == [
        "pass",
        "fail",
        "inconclusive",
        "inconclusive",
    ]
    assert verdict(0.1, 0.001, 0.05, 0.15, 0.02) == "better"
    assert verdict(-0.1, 0.001, -0.15, -0.05, 0.02) == "worse"
    assert verdict(0.01, 0.001, 0.005, 0.015, 0.02) == "equivalent"
    assert verdict(0.01, 0.4, -0.03, 0.05, 0.02) == "inconclusive"


@pytest.mark.parametrize("wrong", [(0.1, 0.0, 0.1), (0.0, 0.1, 0.0), (np.nan, 0.1, 0.1)])
def test_bounds_that_are_none_are_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="margin"):
        non_inferior(*wrong)


def test_two_one_sided_tests_are_those_of_statsmodels() -> None:
    g = np.random.default_rng(4)
    one, two = g.normal(0.01, 0.1, 60), g.normal(0, 0.1, 60)
    bounds = DescrStatsW(one - two).tconfint_mean(alpha=0.1)
    found = []
    for margin in np.linspace(0.001, 0.1, 50):
        p = ttost_paired(one, two, -margin, margin)[0]
        found.append(equivalent(*bounds, margin) == "pass")
        assert found[-1] == (p < 0.05)
    assert 0 < sum(found) < len(found)


def outcomes(true: float, margin: float, n: int, share: float, alpha: float = 0.05) -> dict:
    """The chance of each outcome for n 0/1 items, `share` of them discordant: all counts summed.

    Of m discordant items more for the candidate never turn a pass into less, nor a failure into
    more: the first count that passes and the first that does not fail are found by halving.
    """
    found = {"pass": 0.0, "fail": 0.0, "inconclusive": 0.0}
    row_share = (share + true) / 2 / share
    for m in range(int(binom.ppf(1e-6, n, share)), int(binom.ppf(1 - 1e-6, n, share)) + 1):
        named = [
            lambda row, m=m: decided(row, m, n, alpha, margin) == "pass",
            lambda row, m=m: decided(row, m, n, alpha, margin) != "fail",
        ]
        passing, holding = (bisect_left(range(m + 1), True, key=key) for key in named)
        chance = binom.pmf(m, n, share)
        found["pass"] += chance * binom.sf(passing - 1, m, row_share)
        found["fail"] += chance * binom.cdf(holding - 1, m, row_share)
    return found


def decided(row: int, m: int, n: int, alpha: float, margin: float) -> str:
    return non_inferior(*tango(row, m - row, n, 1 - 2 * alpha), margin)


@pytest.mark.parametrize(
    ("margin", "n", "share"), [(0.03, 600, 0.10), (0.02, 500, 0.05), (0.05, 100, 0.2)]
)
def test_a_candidate_at_the_margin_passes_and_fails_at_most_one_time_in_twenty(
    margin: float, n: int, share: float
) -> None:
    """The worst case of both claims, without simulation."""
    assert outcomes(-margin, margin, n, share)["pass"] <= 0.05
    assert outcomes(-margin, margin, n, share, FAILING * 0.05)["fail"] <= 0.05


def test_the_stated_power_is_how_often_an_equal_candidate_passes() -> None:
    error = np.sqrt(0.10 / 600)
    margin = smallest_margin(error)
    assert chance_to_pass("non_inferiority", error, margin) == pytest.approx(0.8)
    assert outcomes(0.0, margin, 600, 0.10)["pass"] == pytest.approx(0.8, abs=0.025)
    effect = (norm.ppf(0.975) + norm.ppf(0.8)) * error
    assert chance_to_pass("superiority", error, 0, effect=effect) == pytest.approx(0.8)
