"""A plan's steps as jobs: what is shared out, what waits for what, and what each holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.jobs import Machines, builds, measurement, questions
from harness.plan import Plan, plan
from harness.recipe import load


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    return plan(load("tiny").recipe, tmp_path)


def test_a_capture_is_shared_out_and_what_needs_it_waits_for_all(planned: Plan) -> None:
    steps = planned.builds()
    found = builds(planned, steps, [None] * len(steps), Machines(slots=3, gpu=False, threads=2))
    by_name = {job.name: job for job in found}
    capture = next(step for step in steps if step.kind == "capture")
    shares = [job for job in found if job.step == capture and job.work == "capture"]
    assert [job.share for job in shares] == [0, 1, 2]
    assert set(by_name[capture.identity].needs) >= {job.name for job in shares}
    assert {job.cpus for job in shares} == {2}
    assert sum(job.seconds for job in shares) == pytest.approx(1.0)
    alone = builds(planned, steps, [None] * len(steps), Machines(slots=1, gpu=False))
    assert len(alone) == len(steps)
    many = builds(planned, steps, [None] * len(steps), Machines(slots=64, gpu=False))
    assert len(many) == len(steps) + 3 * 4, "32 blocks are four chunks"


def test_on_gpus_models_hold_one_each_and_trainings_their_processes(planned: Plan) -> None:
    steps = planned.builds()
    machine = planned.recipe.machine.model_copy(update={"processes": 4})
    recipe = planned.recipe.model_copy(update={"machine": machine})
    wide = replace(planned, recipe=recipe)
    found = builds(wide, steps, [None] * len(steps), Machines(slots=8, gpu=True))
    held = {(job.step.kind, job.work): job.gpus for job in found}
    assert held["train", "make"] == 4
    assert held["capture", "capture"] == held["capture", "make"] == 1
    assert held["fetch", "make"] == held["merge", "make"] == 0


def test_a_measurement_is_shared_out_by_packs_and_scored_once(planned: Plan) -> None:
    step = planned.evaluations("clm")[0]
    for packs, shares in ((0, 1), (1, 1), (5, 2), (100, 4)):
        found = measurement(planned, "clm", step, packs, None, Machines(slots=4, gpu=False))
        assert [job.work for job in found] == ["answer"] * shares + ["score"]
        assert set(found[-1].needs) >= {job.name for job in found[:-1]}
        assert planned.identities["clm"] in found[0].needs
        assert found[-1].name == step.identity
    (asked,) = questions(planned, [step, step])
    assert asked.name in found[0].needs
    assert str(found[1]) == "evaluate clm · tiny_text, share 2 of 4"
    assert str(found[-1]) == "scores of evaluate clm · tiny_text"
    assert str(asked) == "questions of tiny_text"
