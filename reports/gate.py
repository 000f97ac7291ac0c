"""The regression test of a row: a gate file's rules, their power, and pass, fail or inconclusive.

A gate passes if every rule passes, so no correction is needed for passing; a failure is claimed at
α divided by the number of claims that could fail, so that one of many tasks does not fail a gate by
chance. The statistics are those of `compare`; the decisions those of `gates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reports.compare import Comparison, Difference, NotComparable, compare
from reports.gates import (
    Outcome,
    chance_to_pass,
    non_inferior,
    smallest_margin,
    superior,
    z_score,
)
from reports.records import Run

Kind = Literal["superiority", "non_inferiority", "no_harm"]
EXIT: dict[Outcome, int] = {"pass": 0, "fail": 1, "inconclusive": 3}


class Rule(BaseModel):
    """What is asked of one suite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    suite: str = Field(description="a suite that both rows have")
    kind: Kind = Field(
        description="superiority: better; non_inferiority: the suite loses at most the margin; "
        "no_harm: each task loses at most the margin"
    )
    margin: float | None = Field(
        None, gt=0, lt=1, description="what may be lost: a fraction (0.02 is 2 points), or bits"
    )
    tasks: list[str] | None = Field(None, min_length=1, description="of no_harm; all if left out")

    @model_validator(mode="after")
    def _fits(self) -> Rule:
        if (self.margin is None) != (self.kind == "superiority"):
            raise ValueError(
                "non_inferiority and no_harm need a margin"
                if self.margin is None
                else "superiority has no margin; a margin belongs to non_inferiority and no_harm"
            )
        if self.tasks and self.kind != "no_harm":
            raise ValueError("tasks belong to no_harm; the other kinds judge the whole suite")
        return self


class Gate(BaseModel):
    """A gate file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rules: list[Rule] = Field(min_length=1, description="a list of suite, kind and margin")
    alpha: float = Field(0.05, gt=0, le=0.2, description="how often a wrong claim may be made")
    power: float = Field(0.8, gt=0.5, lt=1, description="the chance to pass that is asked for")


# Tango's upper bound is passed in up to 5.13 % of the cases where 5 % is asked for; a claim that a
# candidate fails is made at this share of α, so that α holds.
FAILING = 0.9

# Without a gate file: no suite may be shown to lose two points, or two hundredths of a bit a byte.
DEFAULT_MARGIN = 0.02


@dataclass(frozen=True)
class Check:
    """One claim of a rule: about a suite, or about one task of it."""

    suite: str
    kind: Kind
    margin: float | None
    unit: str
    difference: Difference
    low: float | None  # one-sided 1 − α bound, for passing
    high: float | None  # one-sided bound at α over the number of claims, for failing
    power: float  # chance to pass an equal candidate; that of superiority is for a gain of `needed`
    needed: float  # smallest margin (or, of superiority, gain) that passes with the power asked for
    outcome: Outcome

    @property
    def name(self) -> str:
        """suite, or suite / task."""
        task = self.difference.name
        return f"{self.suite} / {task}" if self.kind == "no_harm" else self.suite


@dataclass(frozen=True)
class Result:
    """What a gate came to."""

    base: str
    candidate: str
    alpha: float
    power: float
    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        """fail if any claim fails, pass if all pass, else inconclusive."""
        found = [check.outcome for check in self.checks]
        if "fail" in found:
            return "fail"
        return "pass" if all(o == "pass" for o in found) else "inconclusive"


def default(pairs: Sequence[tuple[Run, Run]]) -> Gate:
    """Non-inferiority of every suite, with a margin of 0.02."""
    suites = [base.manifest["suite"] for base, _ in pairs]
    rules = [{"suite": s, "kind": "non_inferiority", "margin": DEFAULT_MARGIN} for s in suites]
    return Gate.model_validate({"rules": rules})


def judge(gate: Gate, pairs: Sequence[tuple[Run, Run]]) -> Result:
    """The gate's outcome. NotComparable for a suite or task that is not there, or unlike runs."""
    by_suite = {base.manifest["suite"]: (base, candidate) for base, candidate in pairs}
    for rule in gate.rules:
        if rule.suite not in by_suite:
            raise NotComparable(
                f"{rule.suite}: not measured of both rows; measured: {', '.join(by_suite)}"
            )
    chosen = [(rule, by_suite[rule.suite]) for rule in gate.rules]
    # First at 1 − 2α for passing; what fails is looked at again at the corrected level.
    found = [(rule, pair, compare(*pair, 1 - 2 * gate.alpha, items=False)) for rule, pair in chosen]
    claims = sum(len(_parts(rule, comparison, pair)) for rule, pair, comparison in found)
    checks: list[Check] = []
    for rule, pair, comparison in found:
        stricter = comparison
        if rule.kind != "superiority":
            stricter = compare(*pair, 1 - 2 * FAILING * gate.alpha / claims, items=False)
        strict_parts = _parts(rule, stricter, pair)
        for part, strict in zip(_parts(rule, comparison, pair), strict_parts, strict=True):
            checks.append(_check(gate, rule, comparison.unit, part, strict.high, claims))
    one = pairs[0]
    return Result(
        one[0].manifest["row"], one[1].manifest["row"], gate.alpha, gate.power, tuple(checks)
    )


def _parts(rule: Rule, comparison: Comparison, pair: tuple[Run, Run]) -> list[Difference]:
    """The differences that a rule is about."""
    if rule.kind != "no_harm":
        return [comparison.total]
    listed = [task["task"] for task in pair[1].manifest["tasks"]]
    titles = {t["task"]: t.get("title", t["task"]) for t in pair[1].manifest["tasks"]}
    unknown = [name for name in rule.tasks or [] if name not in listed]
    if unknown:
        raise NotComparable(
            f"{rule.suite}: no task {', '.join(unknown)}; its tasks: {', '.join(listed)}"
        )
    wanted = [titles[name] for name in rule.tasks or listed]
    return [part for part in comparison.tasks if part.name in wanted]


def _check(
    gate: Gate, rule: Rule, unit: str, part: Difference, high: float | None, claims: int
) -> Check:
    low = part.low
    same = part.better + part.worse == 0
    if same and low is None and part.n >= 20:
        low = high = 0.0  # equal to the last digit on twenty items and more: nothing was lost
    outcome: Outcome = "inconclusive"
    if rule.margin is None:
        limit = gate.alpha if part.gain > 0 else gate.alpha / claims
        outcome = superior(part.gain, part.p_value, limit)
        needed = chance_gain(part.error, gate)
        power = gate.power
    else:
        needed = smallest_margin(part.error, gate.alpha, gate.power)
        power = chance_to_pass("non_inferiority", part.error, rule.margin, gate.alpha)
        if part.interval == "bootstrap" and low is not None and high is not None:
            # A few differing items are fewer than the bootstrap can reckon with.
            low = min(low, part.gain - z_score(gate.alpha) * part.error)
            high = max(high, part.gain + z_score(gate.alpha / claims) * part.error)
        if low is not None and high is not None:
            passed = non_inferior(low, max(low, high), rule.margin) == "pass"
            outcome = "pass" if passed else "fail" if high < -rule.margin else "inconclusive"
    return Check(rule.suite, rule.kind, rule.margin, unit, part, low, high, power, needed, outcome)


def chance_gain(error: float, gate: Gate) -> float:
    """The true gain that superiority shows with the power asked for."""
    from reports.statistics import minimum_detectable_effect

    return minimum_detectable_effect(error**2, 1, alpha=gate.alpha, power=gate.power)
