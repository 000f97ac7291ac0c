"""What an interval decides: better, equivalent, not worse by more than a margin, or nothing.

Decisions have three outcomes. "pass" and "fail" are claims, each wrong in at most α of the cases
where it is not true; all else is "inconclusive", which is not a weak pass. Differences are positive
where the candidate is better.
"""

from __future__ import annotations

from typing import Literal

Outcome = Literal["pass", "fail", "inconclusive"]
Verdict = Literal["better", "worse", "equivalent", "inconclusive"]


def non_inferior(low: float, high: float, margin: float) -> Outcome:
    """Whether a candidate loses at most `margin`: pass if low > −margin, fail if high < −margin.

    `low` and `high` are one-sided 1 − α bounds, that is an interval of level 1 − 2α.
    """
    _check(low, high, margin)
    if low > -margin:
        return "pass"
    return "fail" if high < -margin else "inconclusive"


def equivalent(low: float, high: float, margin: float) -> Outcome:
    """Two one-sided tests (Schuirmann 1987): pass if −margin < low and high < margin.

    Bounds as in `non_inferior`. Fails if the whole interval is beyond a margin.
    """
    _check(low, high, margin)
    if low > -margin and high < margin:
        return "pass"
    return "fail" if high < -margin or low > margin else "inconclusive"


def superior(gain: float, p_value: float, alpha: float = 0.05) -> Outcome:
    """Whether a candidate is better: pass or fail by the sign where p (two-sided) is under α."""
    if not 0 <= p_value <= 1:
        raise ValueError(f"superior: p is {p_value}, not between 0 and 1")
    if p_value >= alpha or gain == 0:
        return "inconclusive"
    return "pass" if gain > 0 else "fail"


def verdict(
    gain: float,
    p_value: float,
    low: float | None,
    high: float | None,
    margin: float | None,
    alpha: float = 0.05,
) -> Verdict:
    """better, worse, equivalent within the margin, or inconclusive.

    A difference within the margin is equivalent even if it is certain that it is not zero: the
    margin says what matters. `low` and `high` are one-sided 1 − α bounds; the limits of a 95 %
    interval, which tables show, make a claim of equivalence wrong in at most 2.5 %. Without bounds
    or margin nothing is equivalent.
    """
    if low is not None and high is not None and margin is not None:
        low, high = min(low, gain), max(high, gain)
        if equivalent(low, high, margin) == "pass":
            return "equivalent"
    found = superior(gain, p_value, alpha)
    if found == "inconclusive":
        return "inconclusive"
    return "better" if found == "pass" else "worse"


def chance_to_pass(
    kind: str, error: float, margin: float, alpha: float = 0.05, effect: float = 0.0
) -> float:
    """The power of a decision if the true difference is `effect` and its standard error `error`.

    non-inferiority: Φ((effect + margin)/SE − z_{1−α}); superiority: Φ(effect/SE − z_{1−α/2}).
    """
    from scipy.stats import norm

    if not error > 0:
        raise ValueError(f"chance_to_pass: the standard error is {error}; it must be positive")
    if kind == "superiority":
        return float(norm.cdf(effect / error - norm.ppf(1 - alpha / 2)))
    return float(norm.cdf((effect + margin) / error - norm.ppf(1 - alpha)))


def z_score(alpha: float) -> float:
    """z_{1−α}."""
    from scipy.stats import norm

    return float(norm.ppf(1 - alpha))


def smallest_margin(error: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The margin at which a candidate that is no worse passes with the given power."""
    return (z_score(alpha) + z_score(1 - power)) * error


def _check(low: float, high: float, margin: float) -> None:
    if not (low <= high and margin > 0):
        raise ValueError(f"bounds [{low}, {high}], margin {margin}: low ≤ high, margin > 0")
