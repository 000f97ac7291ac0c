"""The bootstrap of a macro mean over tasks: draws within tasks, percentile and BCa limits.

A stratum is a task as an array (clusters, 2): Σ w·d and Σ w of each cluster, as `statistics.py`
makes them; the statistic is the unweighted mean over tasks of Σ w·d / Σ w.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Method = Literal["percentile", "bca"]

CATEGORIES = 256  # up to here drawing how often each distinct item comes is the faster way
BLOCK = 4_000_000  # numbers drawn at once, 32 MB


def limits(
    strata: list[Array],
    generator: np.random.Generator,
    draws: int,
    level: float,
    method: Method = "percentile",
) -> tuple[float | None, float | None]:
    """The interval of the macro mean; None if nothing varies.

    BCa moves the percentiles by z0, the share of draws below the mean, and by the acceleration a,
    how the spread grows with the mean (Efron 1987):  Φ(z0 + (z0 + z) / (1 − a·(z0 + z))).
    """
    parts = _collapsed(strata)
    if parts is None:
        return None, None
    total = np.zeros(draws)
    for units, share in parts:
        total += _ratios(units, generator, draws) * share
    if np.ptp(total) == 0:
        return None, None
    places = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        places = _corrected(places, total, parts)
    low, high = np.quantile(total, places)
    return float(low), float(high)


def acceleration(parts: list[tuple[Array, float]]) -> float:
    """Σψ³ / 6(Σψ²)^{3/2} with ψ the jackknife influence of a cluster; 0 if nothing varies."""
    squares = cubes = 0.0
    for units, share in parts:
        n = len(units)
        sums = units.sum(axis=0)
        left = (sums[0] - units[:, 0]) / (sums[1] - units[:, 1]) * share
        influence = (n - 1) / n * (left.mean() - left)
        squares += float(np.sum(influence**2))
        cubes += float(np.sum(influence**3))
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def _corrected(places: Array, total: Array, parts: list[tuple[Array, float]]) -> Array:
    from scipy.stats import norm

    mean = sum(float(u[:, 0].sum() / u[:, 1].sum()) * share for u, share in parts)
    near = 1e-9 * float(np.ptp(total))  # equal draws count half whatever the rounding
    below = float(np.mean(total < mean - near))
    equal = float(np.mean(np.abs(total - mean) <= near))
    share_below = np.clip(below + equal / 2, 0.5 / len(total), 1 - 0.5 / len(total))
    shift, a = norm.ppf(share_below), acceleration(parts)
    z = shift + norm.ppf(places)
    return np.asarray(norm.cdf(shift + z / (1 - a * z)))


def _collapsed(strata: list[Array]) -> list[tuple[Array, float]] | None:
    """What is drawn from, each with its share of the mean; tasks of one cluster become one stratum.

    A unit alone cannot vary: it shares a stratum with the next smallest. None if there is none.
    """
    tasks = len(strata)
    by_size = sorted(range(tasks), key=lambda i: len(strata[i]))
    single = [i for i in by_size if len(strata[i]) == 1]
    if len(single) == 1:
        single = by_size[:2]
    if len(single) == 1:
        return None
    parts = [(strata[i], 1 / tasks) for i in range(tasks) if i not in single]
    if single:
        ratio = [strata[i][:, 0].sum() / strata[i][:, 1].sum() for i in single]
        units = np.stack([np.array(ratio), np.ones(len(ratio))], axis=1)
        parts.append((units, len(single) / tasks))
    return parts


def _ratios(part: Array, generator: np.random.Generator, draws: int) -> Array:
    """(draws,) ratios of sums, each over n − 1 of the n clusters drawn with replacement."""
    sums = drawn(part, generator, draws)
    return np.asarray(sums[:, 0] / sums[:, 1])


def _distinct(part: Array) -> tuple[Array, npt.NDArray[np.int_]]:
    """Rows that differ, in order, and how often each comes."""
    if np.ptp(part[:, 1:], axis=0).any():
        return np.unique(part, axis=0, return_counts=True)
    first, counts = np.unique(part[:, 0], return_counts=True)  # sorts numbers, not rows
    return np.column_stack([first, np.tile(part[0, 1:], (len(first), 1))]), counts


def drawn(part: Array, generator: np.random.Generator, draws: int) -> Array:
    """Sums of each column, (draws, columns), over n − 1 of the n clusters with replacement."""
    units, counts = _distinct(part)
    n = len(part)
    sums = np.empty((draws, part.shape[1]))
    few = len(units) <= CATEGORIES
    step = max(1, BLOCK // (len(units) if few else n))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        if few:
            times = generator.multinomial(n - 1, counts / n, size=size)
            sums[start : start + size] = times.astype(np.float64) @ units
        else:
            places = generator.integers(n, size=(size, n - 1))
            for column in range(part.shape[1]):  # a column at a time lies together in memory
                sums[start : start + size, column] = part[:, column].take(places).sum(axis=1)
    return sums
