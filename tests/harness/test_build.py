"""What is built and what is not: one row's failure leaves the others."""

from __future__ import annotations

from pathlib import Path

from harness.build import build, needed
from harness.plan import plan
from harness.recipe import parse

TEXT = """
sources:
  a: {path: "tiny:llama"}
  b: {path: "tiny:gemma"}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 640}
variants:
  refused: {merge: {inputs: [a, a], method: linear, parameters: {weights: [1, -1]}}}
  later: {merge: {inputs: [refused, a], method: linear}}
  mean: {merge: {inputs: [a, a], method: linear}}
evaluate: {suites: [tiny_text]}
reference: a
"""


def test_parameters_that_only_the_method_refuses_leave_the_other_rows(home: Path) -> None:
    planned = plan(parse(TEXT, "r"), home)
    reasons = build(planned, planned.recipe.rows)
    assert reasons.keys() == {"refused", "later"}
    assert reasons["later"] == reasons["refused"]
    assert reasons["refused"].startswith("merge refused failed: merge method linear: ")
    assert planned.steps[planned.identities["mean"]].done


BUDGET = """
sources: {a: {path: "tiny:llama"}, b: {path: "tiny:gemma"}}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 640}
variants:
  one: {train: {init: a}}
  two: {train: {init: b}}
  fused: {train: {init: a, fuse: {sources: [one, two], function: min_ce, clm_weight: 0.9}}}
  equal: {train: {init: a, budget: fused}}
  merged: {merge: {inputs: [one, a], method: fisher}}
  pack: {ensemble: {members: [one, two], rule: mean_probability}}
  again: {repeat: {row: merged}}
evaluate: {suites: [tiny_text]}
reference: a
"""


def test_a_row_needs_what_its_steps_say_and_nothing_that_only_counts(home: Path) -> None:
    planned = plan(parse(BUDGET, "r"), home)

    def built(row: str) -> list[tuple[str, str]]:
        wanted = needed(planned, [row])
        return [(s.kind, s.name) for s in planned.builds() if s.identity in wanted]

    given = [("fetch", "a"), ("fetch", "b"), ("pack", "corpus")]
    assert built("equal") == [*given, ("train", "equal")]
    both = [("train", "one"), ("train", "two")]
    found = built("fused")
    assert {("capture", "one"), ("capture", "two"), ("map", "b-to-a"), *both} <= set(found)
    merged = [given[0], given[2], ("train", "one")]
    merged += [("statistics", "one"), ("statistics", "a"), ("merge", "merged")]
    assert built("merged") == built("again") == merged
    assert set(built("pack")) == {*given, *both, ("map", "b-to-a")}
