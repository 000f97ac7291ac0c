"""Training seeds as a component: known variances come back, and intervals cover."""

from __future__ import annotations

import numpy as np
import pytest

from reports.seeds import seeds_and_items


def rows(
    g: np.random.Generator, seeds: int, items: int, seed_sd: float, noise: float
) -> np.ndarray:
    item = g.normal(0, 1.0, items)
    return item + g.normal(0, seed_sd, (seeds, 1)) + g.normal(0, noise, (seeds, items))


def test_the_components_are_those_that_were_put_in() -> None:
    g = np.random.default_rng(3)
    found = [seeds_and_items(rows(g, 5, 80, 0.3, 0.5), np.zeros(80)) for _ in range(600)]
    # σ²_seed/S + σ²_noise/(S·n), and σ²_item/n + the same; noise σ²/(S·n).
    noise = 0.25 / (5 * 80)
    assert np.mean([f.seed_variance for f in found]) == pytest.approx(0.09 / 5 + noise, rel=0.1)
    assert np.mean([f.item_variance for f in found]) == pytest.approx(1 / 80 + noise, rel=0.1)
    assert np.mean([f.noise_variance for f in found]) == pytest.approx(noise, rel=0.05)


def test_a_crossed_design_by_hand() -> None:
    """2 seeds × 3 items: means of seeds 2 and 3, of items 1, 2.5, 4; no interaction is left."""
    found = seeds_and_items([[0.5, 2.0, 3.5], [1.5, 3.0, 4.5]], [0.0, 0.0, 0.0])
    assert found.gain == pytest.approx(2.5)
    assert found.seed_variance == pytest.approx(0.25)
    assert found.item_variance == pytest.approx(0.75)
    assert found.noise_variance == pytest.approx(0, abs=1e-12)
    assert found.variance == pytest.approx(1.0)
    assert found.degrees == pytest.approx(1 / (0.25**2 / 1 + 0.75**2 / 2))


@pytest.mark.parametrize(("seeds", "references"), [(3, 1), (3, 3), (5, 1)])
def test_intervals_over_seeds_and_items_cover(seeds: int, references: int) -> None:
    """2000 variants; t with few degrees of freedom is careful, so from 94 to 98 %."""
    g = np.random.default_rng(seeds * 10 + references)
    covered = 0
    for _ in range(2000):
        item = g.normal(0, 1.0, 60)
        one = item + g.normal(0, 0.15, (seeds, 1)) + g.normal(0, 0.5, (seeds, 60))
        two = g.normal(0, 0.15, (references, 1)) * (references > 1) + g.normal(
            0, 0.5, (references, 60)
        )
        found = seeds_and_items(one, two, tasks=np.repeat(["a", "b"], [20, 40]))
        covered += found.low <= 0 <= found.high
    assert 0.94 <= covered / 2000 <= 0.98


@pytest.mark.parametrize(
    ("scores", "reference", "named"),
    [
        ([[1.0, 0.0]], [0.0, 0.0], "seeds ≥ 2"),
        ([[1.0, 0.0]] * 2, [0.0], "seeds"),
        ([[1.0, np.nan]] * 2, [0.0, 0.0], "every seed"),
        ([[1.0]] * 2, [0.0], "one item"),
        ([[1.0, 1.0]] * 2, [0.0, 0.0], "nothing varies"),
        ([[0.3, 0.3, 0.3]] * 3, [0.1, 0.1, 0.1], "nothing varies"),
    ],
)
def test_what_cannot_tell_is_refused(scores: list, reference: list, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        seeds_and_items(scores, reference)


def test_where_nothing_varies_and_nothing_was_gained_nothing_is_claimed() -> None:
    found = seeds_and_items([[1.0, 0.0]] * 2, [1.0, 0.0])
    assert (found.gain, found.p_value) == (0.0, 1.0)
