"""Intervals, paired comparisons, multiplicity and power for scores of items.

What is random here is the draw of items, nothing else: two trainings of one variant differ by more.
Comparisons are paired (both rows answered the same items) and stratified by task, after Miller,
"Adding Error Bars to Evals" (2411.00640). Gains are positive when the row is better; the caller
turns the sign for metrics where lower is better.

H tasks, n items (or clusters of items) of a task, d the difference of an item, w its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reports.bootstrap import BLOCK, Method, limits

Array = npt.NDArray[np.float64]
Values = npt.ArrayLike

DRAWS = 10_000
EXACT_FLIPS = 13  # 2**13 sign patterns: fewer than DRAWS, so all are counted


@dataclass(frozen=True)
class Paired:
    """A row against the reference on the same items; `low` and `high` are None without spread."""

    gain: float  # unweighted mean over tasks of Σ w·d / Σ w
    low: float | None
    high: float | None
    p_value: float  # two-sided, sign-flip permutation test
    null_variance: float  # of the gain if both rows were equally good
    n: int  # items that both rows scored
    better: int  # items where the row has the higher value
    worse: int


@dataclass(frozen=True)
class McNemar:
    """The test for paired 0/1 scores: `row_only` and `reference_only` count discordant items."""

    row_only: int
    reference_only: int
    p_exact: float
    p_mid: float

    @property
    def p_value(self) -> float:
        """mid-p under 25 discordant items, where the exact test is too careful; else exact."""
        return self.p_mid if self.row_only + self.reference_only < 25 else self.p_exact


def macro(scores: Sequence[float]) -> float:
    """The unweighted mean of the tasks' scores; ValueError if there are none."""
    if not len(scores):
        raise ValueError("macro: no task was scored, so there is no mean")
    return float(np.mean(np.asarray(scores, dtype=np.float64)))


def wilson(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion, which is never a point (Wilson 1927).

    `n` may be an effective number of items. ValueError unless 0 ≤ successes ≤ n and n > 0.
    """
    from statsmodels.stats.proportion import proportion_confint

    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"wilson: {successes} of {n}; n must be positive, 0 ≤ successes ≤ n")
    low, high = proportion_confint(successes, n, alpha=1 - level, method="wilson")
    share = successes / n
    return max(0.0, min(float(low), share)), min(1.0, max(float(high), share))


def mcnemar(row_only: int, reference_only: int) -> McNemar:
    """Exact and mid-p McNemar test from the two discordant counts.

    With m = row_only + reference_only, p = min(1, 2·P[Bin(m, ½) ≤ min]); mid-p takes P[X = min]
    off. ValueError for a negative count.
    """
    from scipy.stats import binom

    if min(row_only, reference_only) < 0:
        raise ValueError(f"mcnemar: counts are {row_only} and {reference_only}; none is negative")
    m, least = row_only + reference_only, min(row_only, reference_only)
    tail, point = float(binom.cdf(least, m, 0.5)), float(binom.pmf(least, m, 0.5))
    return McNemar(row_only, reference_only, min(1.0, 2 * tail), min(1.0, 2 * tail - point))


def holm(p_values: Values) -> Array:
    """Holm's adjusted p-values, in the order given (Holm 1979); an empty family gives none."""
    from statsmodels.stats.multitest import multipletests

    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError("holm: p-values must be one list of numbers between 0 and 1")
    return np.asarray(multipletests(p, method="holm")[1]) if len(p) else p


def minimum_detectable_effect(
    variance: float, n: float, *, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The smallest true difference that n paired items show with the given power.

    (z_{1−α/2} + z_power)·√(variance / n), where variance is that of an item's difference if there
    were none: for 0/1 scores the share of items on which the rows disagree.
    """
    from scipy.stats import norm

    if n <= 0 or variance < 0:
        raise ValueError(f"minimum_detectable_effect: variance {variance}, n {n}; n must be > 0")
    return float((norm.ppf(1 - alpha / 2) + norm.ppf(power)) * np.sqrt(variance / n))


def paired_bootstrap(
    scores: Values,
    reference: Values,
    generator: np.random.Generator,
    *,
    tasks: Values | None = None,
    weights: Values | None = None,
    clusters: Values | None = None,
    draws: int = DRAWS,
    level: float = 0.95,
    method: Method = "bca",
) -> Paired:
    """The gain of a row over the reference with a bootstrap interval and a p-value.

        gain = 1/H · Σ_tasks (Σ w·d / Σ w),   d = scores − reference

    Items (n,) with NaN on either side are left out on both. Clusters are drawn within tasks, n − 1
    of n, so that the variance of a task with few items is not understated (Rao & Wu 1988); tasks of
    one cluster are drawn as if they were the items of one task (collapsed strata, which is
    careful). The limits are BCa (Efron 1987). The p-value does not come from these draws: it is
    that of the permutation test that swaps the two rows within clusters, exact up to 13 clusters
    that differ, sampled beyond. The bootstrap itself would call four discordant items out of four
    significant.
    ValueError for lengths that differ, too few draws, or no item that both scored.
    """
    parts = _clusters(scores, reference, tasks, weights, clusters)
    if draws < DRAWS:
        raise ValueError(f"paired_bootstrap: {draws} draws; at least {DRAWS} are needed")
    gain = macro([float(part[:, 0].sum() / part[:, 1].sum()) for part in parts.strata])
    low, high = limits(parts.strata, generator, draws, level, method)
    shares = [part[:, 0] / (part[:, 1].sum() * len(parts.strata)) for part in parts.strata]
    return Paired(
        gain=gain,
        low=low,
        high=high,
        p_value=sign_flip(np.concatenate(shares), generator, draws),
        null_variance=_null_variance(parts),
        n=len(parts.differences),
        better=int((parts.differences > 0).sum()),
        worse=int((parts.differences < 0).sum()),
    )


def _null_variance(parts: _Parts) -> float:
    """Of the gain if both rows were equally good: Σ_tasks v / H², to be read by the normal.

    Items would then differ as much as they do, but about 0 in place of the task's gain d̄:

        v = ( Σ_clusters (Σ w·(d − d̄))² · n / (n − 1)  +  Σ w²·d̄² if right or wrong ) / (Σ w)²

    with n clusters. Right/wrong items, which are as often different either way, have McNemar's
    Σ w²·d², and that with the clusters' dependence in it. A task of one cluster cannot tell what it
    varies by and keeps d̄ = 0, which is careful. Where v is itself estimated from few clusters it
    counts `careful` times, with Satterthwaite's degrees of freedom over the tasks.
    """
    total = uncertain = 0.0
    for part, (d, w) in zip(parts.strata, parts.items, strict=True):
        moved, weight, n = part[:, 0], part[:, 1], len(part)
        gain = moved.sum() / weight.sum()
        right_or_wrong = np.isin(d, (-1.0, 0.0, 1.0)).all()
        share = (weight.sum() * len(parts.strata)) ** 2
        if n == 1 or (right_or_wrong and n == len(d)):
            total += float(np.sum(moved**2)) / share
            continue
        apart = moved - gain * weight
        apart[np.abs(apart) <= 1e-12 * np.abs(moved).max()] = 0  # rounding is no variance
        variance = float(np.sum(apart**2)) * n / (n - 1) / share
        total += variance + float(gain**2 * np.sum(w**2) * right_or_wrong) / share
        uncertain += variance**2 / (n - 1)
    return total * careful(total**2 / uncertain) ** 2 if uncertain else total


def careful(degrees: float) -> float:
    """By how much a standard error that was estimated with so many degrees of freedom is to grow to
    be read by the normal: the ratio of the 97.5 % points of Student's t and of the normal.
    """
    from scipy.stats import norm, t

    return float(t.ppf(0.975, degrees) / norm.ppf(0.975))


def score_interval(
    values: Values,
    generator: np.random.Generator,
    *,
    weights: Values | None = None,
    clusters: Values | None = None,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """The interval of one task's score Σ w·v / Σ w, or None if the items cannot tell.

    Wilson for 0/1 values of equal weight, with n divided by the design effect of the clusters; else
    percentiles of a bootstrap over clusters. ValueError if no value is scored.
    """
    parts = _clusters(values, np.zeros_like(np.asarray(values, float)), None, weights, clusters)
    part, value = parts.strata[0], parts.differences
    score = float(part[:, 0].sum() / part[:, 1].sum())
    if np.isin(value, (0.0, 1.0)).all() and np.ptp(parts.weights) == 0:
        n = float(len(value))
        if len(part) < n:
            n = _effective(part, score, n)
        return wilson(min(n, score * n), n, level)
    low, high = limits(parts.strata, generator, DRAWS, level)
    return None if low is None or high is None else (low, high)


def macro_interval(
    scores: Sequence[float], intervals: Sequence[tuple[float, float] | None]
) -> tuple[float, float] | None:
    """The interval of an unweighted mean over tasks from the tasks' own intervals (MOVER).

    mean ± 1/H·√Σ (distance to each task's limit)², Zou & Donner 2008; None if a task has none.
    """
    mean = macro(scores)
    below = above = 0.0
    for score, interval in zip(scores, intervals, strict=True):
        if interval is None:
            return None
        below += (score - interval[0]) ** 2
        above += (interval[1] - score) ** 2
    return mean - float(np.sqrt(below)) / len(scores), mean + float(np.sqrt(above)) / len(scores)


@dataclass(frozen=True)
class _Parts:
    strata: list[Array]  # for each task (clusters, 2): Σ w·d and Σ w of each cluster
    items: list[tuple[Array, Array]]  # for each task: d and w of each item
    differences: Array  # (n,)
    weights: Array  # (n,)


def _clusters(
    scores: Values,
    reference: Values,
    tasks: Values | None,
    weights: Values | None,
    clusters: Values | None,
) -> _Parts:
    """Items summed by cluster, tasks and clusters in the order in which they first come."""
    from pandas import factorize

    a, b = np.asarray(scores, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    n = len(a)
    task = np.zeros(n, dtype=int) if tasks is None else np.asarray(tasks)
    weight = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    cluster = np.arange(n) if clusters is None else np.asarray(clusters)
    lengths = {len(b), len(task), len(weight), len(cluster)}
    if lengths != {n}:
        raise ValueError(f"paired items: {n} scores beside columns of {sorted(lengths)}")
    used = ~(np.isnan(a) | np.isnan(b))
    if not used.any():
        raise ValueError("paired items: no item has a score on both sides")
    difference, task, weight, cluster = (a - b)[used], task[used], weight[used], cluster[used]
    code, names = factorize(task)
    strata: list[Array] = []
    items: list[tuple[Array, Array]] = []
    for number in range(len(names)):
        inside = code == number
        group, _ = factorize(cluster[inside])
        summed = [
            np.bincount(group, weights=w) for w in ((weight * difference)[inside], weight[inside])
        ]
        strata.append(np.stack(summed, axis=1))
        items.append((difference[inside], weight[inside]))
    return _Parts(strata, items, difference, weight)


def sign_flip(parts: Array, generator: np.random.Generator, draws: int) -> float:
    """P[|Σ ±part| ≥ |Σ part|] over all or sampled signs; 1 if every part is zero."""
    sizes = np.abs(parts[parts != 0])
    observed = abs(parts.sum()) * (1 - 1e-9)  # equal sums count as equal whatever the rounding
    if len(sizes) <= EXACT_FLIPS:
        patterns = np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ sizes) >= observed))
    units, counts = np.unique(sizes, return_counts=True)
    extreme, step = 0, max(1, BLOCK // len(units))
    for start in range(0, draws, step):
        shape = (min(step, draws - start), len(units))
        if len(units) == len(sizes):  # each size once: one sign each, which is faster to draw
            plus: Array = generator.integers(0, 2, size=shape, dtype=np.int8).astype(np.float64)
        else:
            plus = generator.binomial(counts, 0.5, size=shape).astype(np.float64)
        totals = (2 * plus - counts) @ units
        extreme += int((np.abs(totals) >= observed).sum())
    return (1 + extreme) / (1 + draws)


def _effective(part: Array, score: float, n: float) -> float:
    """n over the design effect: the clustered variance of a proportion over the binomial one."""
    clusters = len(part)
    spread = float(np.sum((part[:, 0] - score * part[:, 1]) ** 2)) / n**2
    if clusters < 2 or spread == 0:
        return float(clusters)
    spread *= clusters / (clusters - 1)
    return float(np.clip(score * (1 - score) / spread, 1.0, n))
