"""What another training run of the same variant would change: seeds × items.

Items alone tell how well these weights do on other questions; several training seeds tell how well
the variant does. Both are random here and crossed: every seed answers the same items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reports.statistics import Values

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Components:
    """A gain over seeds and items, and how much of its variance each of them brings."""

    gain: float  # mean over seeds and tasks
    low: float
    high: float
    seed_variance: float  # of the gain, from training seeds (of both rows)
    item_variance: float  # of the gain, from the draw of items
    noise_variance: float  # of the gain, from which seed meets which item; in both of the above
    degrees: float  # of freedom, Satterthwaite

    @property
    def variance(self) -> float:
        """Of the gain: seeds + items − what both count; at least the greater of the two."""
        total = self.seed_variance + self.item_variance - self.noise_variance
        return max(total, self.seed_variance, self.item_variance)

    @property
    def p_value(self) -> float:
        """Two-sided, of the gain by Student's t; 1 where nothing varies and nothing was gained."""
        from scipy.stats import t

        if self.variance == 0:
            return 1.0
        return float(2 * t.sf(abs(self.gain) / self.variance**0.5, self.degrees))


def seeds_and_items(
    scores: Values, reference: Values, tasks: Values | None = None, level: float = 0.95
) -> Components:
    """The gain of a variant over the reference with training seeds as a component of its own.

    scores (S, n), reference (R, n): seeds × items, S ≥ 2; R = 1 is a reference that is not trained
    (a source). With S̄ the mean over seeds, and means over items macro over tasks:

        Var = Var_s(gain of a seed)/S + Var_i(S̄ − R̄) − noise,   gain ± t·√Var

    The moments of a two-way crossed design (Searle, Casella & McCulloch 1992, 5.2), t with
    Satterthwaite's degrees of freedom. ValueError for fewer than two seeds, NaN, items of a task
    that are alone, or a gain that is the same for every seed and item: equal numbers say nothing
    of what others would be.

    Relative to a bootstrap that draws seeds and items: with three seeds that takes its spread from
    three numbers; t knows that they are three.
    """
    from scipy.stats import t

    a, b = np.atleast_2d(np.asarray(scores, float)), np.atleast_2d(np.asarray(reference, float))
    if len(a) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"seeds_and_items: {a.shape} and {b.shape}; needs (seeds ≥ 2, n) beside (seeds, n)"
        )
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("seeds_and_items: every seed must have a score of every item")
    label = np.zeros(a.shape[1], int) if tasks is None else np.asarray(tasks)
    groups = [np.flatnonzero(label == name) for name in np.unique(label)]
    if min(len(group) for group in groups) < 2:
        raise ValueError("seeds_and_items: a task has one item; its variance is unknown")
    items = _over_items((a.mean(axis=0) - b.mean(axis=0))[None], groups)
    seeds, noise = _over_seeds(a, groups), _noise(a, groups)
    bottom = seeds**2 / (len(a) - 1) + items**2 / (a.shape[1] - len(groups))
    if len(b) > 1:
        extra = _over_seeds(b, groups)
        seeds, noise = seeds + extra, noise + _noise(b, groups)
        bottom += extra**2 / (len(b) - 1)
    gain = float(_macro(a, groups).mean() - _macro(b, groups).mean())
    found = Components(gain, gain, gain, seeds, items, noise, 1.0)
    if found.variance <= 1e-24 * gain**2 and gain:  # up to rounding
        raise ValueError("seeds_and_items: nothing varies, so how sure the gain is is unknown")
    degrees = max(1.0, found.variance**2 / bottom) if bottom > 0 else 1.0
    reach = float(t.ppf((1 + level) / 2, degrees)) * float(np.sqrt(found.variance))
    return Components(gain, gain - reach, gain + reach, seeds, items, noise, degrees)


def _macro(values: Array, groups: list[npt.NDArray[np.intp]]) -> Array:
    """(seeds,) unweighted means over tasks."""
    return np.asarray(np.mean([values[:, g].mean(axis=1) for g in groups], axis=0))


def _over_seeds(values: Array, groups: list[npt.NDArray[np.intp]]) -> float:
    return float(_macro(values, groups).var(ddof=1) / len(values))


def _over_items(values: Array, groups: list[npt.NDArray[np.intp]]) -> float:
    """The variance of the macro mean of one row of values, from items within tasks."""
    parts = [values[0, g].var(ddof=1) / len(g) for g in groups]
    return float(np.sum(parts)) / len(groups) ** 2


def _noise(values: Array, groups: list[npt.NDArray[np.intp]]) -> float:
    """What is left of an item's values once seed and item are taken off, as part of the gain."""
    total = 0.0
    for group in groups:
        part = values[:, group]
        left = part - part.mean(axis=0) - part.mean(axis=1, keepdims=True) + part.mean()
        total += float(np.sum(left**2)) / ((len(part) - 1) * (len(group) - 1)) / part.size
    return total / len(groups) ** 2
