"""The score interval of paired 0/1 differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from reports.discordance import tango
from reports.statistics import minimum_detectable_effect


def test_the_published_example_of_hyper_responsive_airways() -> None:
    """1 and 7 discordant of 21 (Fagerland, Lydersen & Laake 2014): −0.517 to −0.026."""
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@given(n=st.integers(2, 60), data=st.data())
def test_the_limits_solve_the_score_equation_with_a_searched_nuisance_share(
    n: int, data: st.DataObject
) -> None:
    b = data.draw(st.integers(0, n))
    c = data.draw(st.integers(0, n - b))
    low, high = tango(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert high - low > 1e-3
    for limit in (low, high):
        if -0.999 < limit < 0.999:
            # The likeliest q under p_b = q + Δ, found by search instead of the closed form.
            def unlikely(q: float, delta: float = limit) -> float:
                share = [q + delta, q, 1 - 2 * q - delta]
                return -sum(
                    k * np.log(max(p, 1e-300))
                    for k, p in zip((b, c, n - b - c), share, strict=True)
                )

            ends = (max(0.0, -limit), (1 - limit) / 2)
            q = minimize_scalar(unlikely, bounds=ends, method="bounded", options={"xatol": 1e-13}).x
            spread = np.sqrt(n * max(2 * q + limit * (1 - limit), 1e-12))
            z = (b - c - n * limit) / spread
            assert abs(z) == pytest.approx(norm.ppf(0.975), rel=1e-3, abs=1e-3)


@given(n=st.integers(1, 80), data=st.data())
def test_turning_the_rows_turns_the_interval(n: int, data: st.DataObject) -> None:
    b = data.draw(st.integers(0, n))
    c = data.draw(st.integers(0, n - b))
    low, high = tango(b, c, n)
    assert tango(c, b, n) == pytest.approx((-high, -low), abs=1e-6)


def test_rows_that_agree_everywhere_still_have_an_interval() -> None:
    low, high = tango(0, 0, 100)
    assert (low, high) == pytest.approx((-0.037, 0.037), abs=1e-3)
    with pytest.raises(ValueError, match="together at most"):
        tango(3, 3, 5)


@pytest.mark.parametrize(("only_row", "only_base"), [(0.05, 0.05), (0.10, 0.04), (0.03, 0.01)])
def test_ninety_five_percent_intervals_cover_that_often(only_row: float, only_base: float) -> None:
    """20 000 draws of 400 items: a standard error of 0.15 points, the bound is one point."""
    g = np.random.default_rng(5)
    n = 400
    drawn = g.multinomial(n, [only_row, only_base, 1 - only_row - only_base], size=20_000)
    pairs, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
    found = [tango(row, base, n) for row, base in pairs]
    inside = [low <= only_row - only_base <= high for low, high in found]
    covered = np.average(inside, weights=times)
    assert covered == pytest.approx(0.95, abs=0.01)


# harnesses.md 5.6, from the FuseLLM paper (2401.10491, tables 1 and 2) and the sizes of its sets:
# suite, items, Llama-2 CLM, FuseLLM, standard error of the unpaired difference, its p, the largest
# share of discordant items at which the gain would be significant paired, what 80 % power shows at
# a share of 5 % and 10 %. All but n and p in points.
PAPER = [
    ("BBH", 6511, 40.44, 41.75, 0.86, 0.13, 29, 0.78, 1.10),
    ("ARC-e", 2376, 74.54, 75.04, 1.26, 0.69, 1.5, 1.29, 1.82),
    ("ARC-c", 1172, 46.50, 47.44, 2.06, 0.65, 2.7, 1.83, 2.59),
    ("BoolQ", 3270, 76.88, 78.13, 1.03, 0.23, 13, 1.10, 1.55),
    ("HellaSwag", 10042, 76.57, 76.78, 0.60, 0.73, 1.2, 0.63, 0.88),
    ("OpenBookQA", 500, 44.80, 45.40, 3.15, 0.85, 0.5, 2.80, 3.96),
]


@pytest.mark.parametrize("line", PAPER, ids=[line[0] for line in PAPER])
def test_the_papers_six_gains_are_as_resolvable_as_worked_out_by_hand(line: tuple) -> None:
    _, n, clm, fused, error, p, share, five, ten = line
    gain = (fused - clm) / 100
    unpaired = np.sqrt(sum(x / 100 * (1 - x / 100) for x in (clm, fused)) / n)
    assert 100 * unpaired == pytest.approx(error, abs=0.006)
    assert 2 * norm.sf(gain / unpaired) == pytest.approx(p, abs=0.006)
    assert 100 * minimum_detectable_effect(0.05, n) == pytest.approx(five, abs=0.006)
    assert 100 * minimum_detectable_effect(0.10, n) == pytest.approx(ten, abs=0.006)
    # Paired, z² = gain²·n / share at zero difference: the interval leaves zero just below that.
    exact = gain**2 * n / norm.ppf(0.975) ** 2
    assert 100 * exact == pytest.approx(share, rel=0.05, abs=0.05)
    difference = gain * n
    for factor, decided in ((0.9, True), (1.1, False)):
        total = max(exact * factor * n, difference)
        low, _ = tango((total + difference) / 2, (total - difference) / 2, n)
        if total > difference:
            assert (low > 0) is decided


def test_only_bbh_and_boolq_of_the_paper_exceed_what_their_items_show() -> None:
    """At five discordant items of a hundred; the other four gains are under their resolution."""
    shown = [s for s, n, a, b, *_ in PAPER if (b - a) / 100 > minimum_detectable_effect(0.05, n)]
    assert shown == ["BBH", "BoolQ"]
