"""What is built and what is not: one row's failure leaves the others."""

from __future__ import annotations

from pathlib import Path

from harness.build import build
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
