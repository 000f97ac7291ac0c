"""The order of jobs: nothing before what it needs, longest path first, and what that comes to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import RunError
from harness.jobs import Job
from harness.schedule import (
    Room,
    Waiting,
    bound,
    critical,
    paths,
    simulate,
    utilisation,
)
from harness.steps import Step

STEP = Step("merge", "m", Path("m-1"), "1", {}, rows=("m",))


def jobs(**said: tuple[float, tuple[str, ...]]) -> dict[str, Job]:
    """Jobs by name: seconds, and the names that they need."""
    return {
        name: Job(name, "make", STEP, "m", needs, seconds)
        for name, (seconds, needs) in said.items()
    }


DIAMOND = jobs(a=(1, ()), b=(2, ("a",)), c=(5, ("a",)), d=(1, ("b", "c")), e=(3, ()))


def test_a_path_is_the_longest_chain_that_begins_with_a_job() -> None:
    assert paths(DIAMOND) == {"a": 7, "b": 3, "c": 6, "d": 1, "e": 3}
    assert [job.name for job in critical(DIAMOND)] == ["a", "c", "d"]
    with pytest.raises(RunError, match="2 jobs wait for each other"):
        paths(jobs(a=(1, ("b",)), b=(1, ("a",)), c=(1, ())))


@pytest.mark.parametrize(("workers", "makespan"), [(1, 12), (2, 7), (3, 7)])
def test_a_simulation_takes_what_can_be_reckoned_by_hand(workers: int, makespan: float) -> None:
    outcome = simulate(DIAMOND, Room(cpus=workers))
    assert outcome.makespan == makespan
    assert utilisation(outcome, workers) == pytest.approx(12 / makespan / workers)
    assert bound(DIAMOND, workers) == max(12 / workers, 7)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Job]:
    out: dict[str, Job] = {}
    for number in range(draw(st.integers(1, 12))):
        needs = draw(st.lists(st.sampled_from(sorted(out)), unique=True)) if out else []
        seconds = draw(st.integers(0, 9))
        out |= jobs(**{f"j{number}": (seconds, tuple(needs))})
    return out


@given(plans(), st.integers(1, 5))
def test_no_simulation_beats_the_bound_or_is_twice_as_long(
    made: dict[str, Job], workers: int
) -> None:
    outcome = simulate(made, Room(cpus=workers))
    total, longest = sum(job.seconds for job in made.values()), max(paths(made).values())
    assert outcome.busy == total
    assert bound(made, workers) <= outcome.makespan + 1e-9
    # Graham 1969: what keeps every worker busy while it can.
    assert outcome.makespan <= total / workers + longest * (1 - 1 / workers) + 1e-9


def test_jobs_without_needs_take_linearly_less_with_more_workers() -> None:
    many = jobs(**{f"j{number}": (10, ()) for number in range(64)})
    for workers in (1, 2, 8, 32, 64):
        assert simulate(many, Room(cpus=workers)).makespan == 640 / workers
    assert simulate(many, Room(cpus=128)).makespan == 10


def test_a_wide_job_is_not_overtaken_but_jobs_without_gpus_go_on() -> None:
    waiting = Waiting()
    wide = replace(DIAMOND["a"], name="wide", seconds=9, gpus=8)
    narrow = replace(DIAMOND["a"], name="narrow", seconds=1, gpus=1)
    other = replace(DIAMOND["a"], name="other", seconds=1)
    waiting.add([narrow, other, wide])
    assert [job.name for job in waiting.begin(Room(cpus=16, gpus=4))] == ["other"]
    assert [job.name for job in waiting.begin(Room(cpus=16, gpus=9))] == ["wide", "narrow"]
    with pytest.raises(RunError, match="needs 8 GPUs"):
        simulate({"wide": wide}, Room(gpus=4))


def test_what_stands_on_a_job_that_failed_is_given_up() -> None:
    waiting = Waiting()
    waiting.add(list(DIAMOND.values()))
    assert [job.name for job in waiting.begin(Room(cpus=2))] == ["a", "e"]
    waiting.end("a")
    assert {job.name for job in waiting.ready()} == {"b", "c"}
    assert [job.name for job in waiting.begin(Room(cpus=1))] == ["c"]
    assert [job.name for job in waiting.drop("c")] == ["d"]
    assert [job.name for job in waiting.begin(Room(cpus=1))] == ["b"]
    waiting.add([replace(DIAMOND["c"])])  # tried again
    assert [job.name for job in waiting.begin(Room(cpus=1))] == ["c"]
