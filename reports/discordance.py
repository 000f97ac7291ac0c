"""Score interval of a paired difference of 0/1 scores: what b and c discordant items of n tell.

The interval of `kfuse compare` and of gates where both rows answered the same right/wrong items. It
inverts the test whose statistic at zero is McNemar's, so it is never a point, not even where the
rows agree on every item.
"""

from __future__ import annotations

import numpy as np


def tango(
    row_only: float, reference_only: float, n: float, level: float = 0.95
) -> tuple[float, float]:
    """The score interval of (row_only − reference_only) / n (Tango 1998).

    All Δ with |b − c − nΔ| ≤ z·√(n(2q + Δ(1 − Δ))), where q is the most likely share of items that
    only the reference has right if the difference is Δ:

        q = (√(B² − 4AC) − B) / 2A,  A = 2n,  B = (2n − b + c)Δ − b − c,  C = −cΔ(1 − Δ)

    Counts and `n` may be effective numbers (divided by a design effect). Covers its level within a
    point from about 30 items on. ValueError unless 0 ≤ counts, their sum ≤ n and n > 0.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    b, c = row_only, reference_only
    if not (n > 0 and min(b, c) >= 0 and b + c <= n * (1 + 1e-12)):
        raise ValueError(f"tango: counts {b} and {c} of {n}; counts are ≥ 0, together at most n")
    z = float(norm.ppf((1 + level) / 2))

    def distance(delta: float) -> float:
        """(b − c − nΔ)² against z² times its variance: negative inside the interval."""
        first, last = (2 * n - b + c) * delta - b - c, -c * delta * (1 - delta)
        root = np.sqrt(max(0.0, first * first - 8 * n * last))
        q = max(0.0, (root - first) / (4 * n))
        variance = n * max(0.0, 2 * q + delta * (1 - delta))
        return float((b - c - n * delta) ** 2 - z * z * variance)

    middle = (b - c) / n
    if abs(middle) == 1:  # at the end of the scale only one side is open
        inner = brentq(distance, -middle, middle * (1 - 1e-12), xtol=1e-12)
        return (float(inner), 1.0) if middle > 0 else (-1.0, float(inner))
    inside = middle
    if distance(inside) >= 0:  # no discordant item: the variance at zero is zero, too
        inside = 0.0
        edge = z * z / (n + z * z)
        return -edge, edge
    low = -1.0 if distance(-1.0) <= 0 else brentq(distance, -1.0, inside, xtol=1e-12)
    high = 1.0 if distance(1.0) <= 0 else brentq(distance, inside, 1.0, xtol=1e-12)
    return float(low), float(high)
