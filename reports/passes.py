"""Scores from several samples of a problem, and standard errors of clustered items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reports.statistics import Values, wilson


@dataclass(frozen=True)
class Estimate:
    """A mean over items with its standard error and 95 % interval, as fractions."""

    value: float
    error: float | None  # None for a single cluster, which cannot tell
    low: float | None
    high: float | None
    clusters: int


def standard_error(values: Values, clusters: Values | None = None) -> float | None:
    """The standard error of a mean of items that come in clusters; None for one cluster.

        SE² = C/(C − 1) · n⁻² · Σ_c (Σ_{i∈c} (v_i − v̄))²

    values (n,), clusters (n,) of any kind; without clusters every item is its own. Miller
    2411.00640, section 2.2, with the correction for few clusters. ValueError for no item or NaN.
    """
    v = np.asarray(values, dtype=np.float64)
    if not len(v) or np.isnan(v).any():
        raise ValueError(f"standard_error: {len(v)} values; needs some, and none of them NaN")
    group = np.arange(len(v)) if clusters is None else np.asarray(clusters)
    if len(group) != len(v):
        raise ValueError(f"standard_error: {len(v)} values beside {len(group)} clusters")
    _, code = np.unique(group, return_inverse=True)
    sums = np.bincount(code, weights=v - v.mean())
    count = len(sums)
    if count < 2:
        return None
    return float(np.sqrt(count / (count - 1) * np.sum(sums**2)) / len(v))


def pass_at_k(samples: Values, right: Values, k: int) -> npt.NDArray[np.float64]:
    """The chance that one of k samples of each problem is right, (problems,), without bias.

        pass@k = 1 − C(n − c, k) / C(n, k) = 1 − Π_{i=n−c+1..n} (1 − k/i)

    samples: n, right: c, both (problems,). Chen et al. 2107.03374, equation 1. ValueError unless
    0 ≤ c ≤ n and 1 ≤ k ≤ n for every problem: a problem with fewer samples has no pass@k.
    """
    from scipy.special import gammaln

    n, c = np.asarray(samples, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if n.shape != c.shape or not len(n):
        raise ValueError(f"pass_at_k: {n.size} problems with samples, {c.size} with right ones")
    if not (k >= 1 and np.all((c >= 0) & (c <= n) & (k <= n))):
        raise ValueError(f"pass@{k}: needs 0 ≤ right ≤ samples and k ≤ samples in every problem")
    wrong = n - c
    possible = wrong >= k
    w = np.where(possible, wrong, k)
    missed = np.exp(gammaln(w + 1) - gammaln(w - k + 1) - gammaln(n + 1) + gammaln(n - k + 1))
    return np.asarray(np.where(possible, 1 - missed, 1.0).clip(0, 1))


def pass_rate(samples: Values, right: Values, k: int, clusters: Values | None = None) -> Estimate:
    """pass@k as the mean over problems, with the error of drawing other problems.

    Clusters join problems that share one origin (a MultiPL-E problem in several languages). The
    interval is Wilson's where every problem is 0 or 1 and alone, else Student's t over clusters.
    """
    from scipy.stats import t

    values = pass_at_k(samples, right, k)
    mean, error = float(values.mean()), standard_error(values, clusters)
    count = len(values) if clusters is None else len(np.unique(np.asarray(clusters)))
    if count == len(values) and np.isin(values, (0.0, 1.0)).all():
        low, high = wilson(float(values.sum()), count)
        return Estimate(mean, error, low, high, count)
    if error is None or error == 0:
        return Estimate(mean, error, None, None, count)
    reach = float(t.ppf(0.975, count - 1)) * error
    return Estimate(mean, error, max(0.0, mean - reach), min(1.0, mean + reach), count)
