"""Decisions with a third outcome, their error rates and their power."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats.weightstats import ttost_paired

from reports.discordance import tango
from reports.gates import (
    chance_to_pass,
    equivalent,
    non_inferior,
    smallest_margin,
    superior,
    tost,
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
    assert tost(one - two, 0.05) == pytest.approx(ttost_paired(one, two, -0.05, 0.05)[0])
    with pytest.raises(ValueError, match="all equal"):
        tost([0.1, 0.1], 0.05)


def outcomes(true: float, margin: float, n: int, share: float) -> dict[str, float]:
    """How often each outcome comes for 0/1 items that differ by `true`, 20 000 draws."""
    g = np.random.default_rng(6)
    b, c = (share + true) / 2, (share - true) / 2
    drawn = g.multinomial(n, [b, c, 1 - b - c], size=20_000)[:, :2]
    pairs, times = np.unique(drawn, axis=0, return_counts=True)
    found = {"pass": 0, "fail": 0, "inconclusive": 0}
    for (row, base), count in zip(pairs, times, strict=True):
        found[non_inferior(*tango(row, base, n, 0.90), margin)] += int(count)
    return {kind: count / 20_000 for kind, count in found.items()}


def test_a_candidate_at_the_margin_passes_and_fails_one_time_in_twenty() -> None:
    """The worst case of both claims; half a point of slack for counts that are whole numbers."""
    found = outcomes(true=-0.03, margin=0.03, n=600, share=0.10)
    assert found["pass"] <= 0.055
    assert found["fail"] <= 0.055


def test_the_stated_power_is_how_often_an_equal_candidate_passes() -> None:
    error = np.sqrt(0.10 / 600)
    margin = smallest_margin(error)
    assert chance_to_pass("non_inferiority", error, margin) == pytest.approx(0.8)
    assert outcomes(0.0, margin, 600, 0.10)["pass"] == pytest.approx(0.8, abs=0.025)
    effect = (norm.ppf(0.975) + norm.ppf(0.8)) * error
    assert chance_to_pass("superiority", error, 0, effect=effect) == pytest.approx(0.8)
