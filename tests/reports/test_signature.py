"""What a signature says, and what forbids to compare two runs."""

from __future__ import annotations

from typing import Any

import pytest

from reports.signature import differences, sandbox, signature

TASK = {"task": "t", "metric": "pass@1", "higher_is_better": True, "shots": 0, "n_total": 2}
RUN: dict[str, Any] = {"row": "a", "suite": "code", "protocol": "p", "model_identity": "0123456789"}
RUN |= {"seed": 17, "dtype": "float32", "lm_eval": "0.4.13", "tasks": [TASK]}
HERE = {"tier": "namespace", "reason": "", "toolchains": {"py": "3.12.3", "lua": "5.4"}}
THERE = HERE | {"tier": "container", "image": "py38", "image_id": "sha256:ab"}


def test_a_signature_says_where_programs_ran() -> None:
    assert "|sandbox:" not in signature(RUN, 2, 2)
    within = signature(RUN | {"sandbox": THERE}, 2, 2).split("|sandbox:")[1].split("|")[0]
    assert within.startswith("container@")
    assert len(within) == len("container@") + 8


@pytest.mark.parametrize(
    "other",
    [
        None,
        THERE,
        HERE | {"tier": "process"},
        HERE | {"toolchains": {"py": "3.8.20", "lua": "5.4"}},
    ],
)
def test_programs_that_ran_elsewhere_are_not_compared(other: dict[str, Any] | None) -> None:
    here, there = RUN | {"sandbox": HERE}, RUN | {"sandbox": other}
    expected = f"sandbox is {sandbox(here)}, in the reference {sandbox(there)}"
    assert differences(here, there) == [expected]
    assert differences(there, RUN | {"sandbox": other}) == []


def test_order_of_languages_and_reasons_of_a_tier_do_not_matter_and_old_runs_compare() -> None:
    again = HERE | {"toolchains": {"lua": "5.4", "py": "3.12.3"}, "reason": "no user namespaces"}
    assert differences(RUN | {"sandbox": again}, RUN | {"sandbox": HERE}) == []
    assert differences(RUN, dict(RUN)) == []
    assert sandbox(RUN) is None
