"""What a sweep gains from workers: its jobs simulated in the order in which they really go.

Of `fusellm` a job takes what the forecast says for an A100; of recipes that are finished in the
store, what their manifests recorded. Nothing is run, and neither Ray nor a GPU is needed. Starting
processes and moving bytes are not in it. KFUSE_DATA names a folder of questions (`--data`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from harness.forecast import Work, rates_of, works
from harness.jobs import Job, Machines, builds, measurement, questions
from harness.measuring import Measuring
from harness.plan import Plan, Step, plan
from harness.progress import say
from harness.questions import Questions, counted
from harness.recipe import load
from harness.run import asked
from harness.schedule import Room, bound, critical, names, paths, simulate, utilisation, width
from harness.store import home, read_manifest

SWEEP, GPU, WORKERS = "fusellm", "a100", 64
FINISHED = (
    "ablation",
    "fusellm_small",
    "mutual_small",
    "quickstart",
    "tiny",
)  # looked for in the store
CURVE = (1, 2, 4, 8, 16, 24, 32, 48, WORKERS)


@dataclass(frozen=True)
class Recorded:
    """A plan's steps with what each takes, and the packs of its suites."""

    plan: Plan
    made: list[tuple[Step, Work]]
    measured: list[tuple[Step, Work]]
    packs: Mapping[str, int]

    def jobs(self, machines: Machines) -> dict[str, Job]:
        """All jobs on so many workers; what nobody knows takes no time."""
        made, costs = [step for step, _ in self.made], [work for _, work in self.made]
        found = builds(self.plan, made, costs, machines)
        found += questions(self.plan, [step for step, _ in self.measured])
        for step, work in self.measured:
            packs = self.packs[step.name]
            found += measurement(self.plan, step.rows[0], step, packs, work, machines)
        known = {s.identity: w.seconds is not None for s, w in [*self.made, *self.measured]}
        return {
            job.name: job if known[job.step.identity] and job.work != "questions" else _free(job)
            for job in found
        }


def _free(job: Job) -> Job:
    return replace(job, seconds=0.0)


def executor() -> None:
    """Makespan, utilisation and critical path on up to 64 workers."""
    data = os.environ.get("KFUSE_DATA")
    given = [f"evaluate.data={json.dumps(os.path.abspath(data))}"] if data else []
    say(f"{SWEEP}, by the forecast for {GPU}:")
    curve(opened(SWEEP, given), gpu=True)
    for name in FINISHED:
        planned = plan(load(name).recipe, home())
        if all(step.done for step in asked(planned, load(name))):
            say(f"{name}, as recorded in {home()}:")
            curve(opened(name, recorded=True), gpu=False)


def opened(recipe: str, overrides: Sequence[str] = (), recorded: bool = False) -> Recorded:
    """A recipe's costs: as forecast, or as its manifests have recorded them.

    A suite whose questions cannot be had is left out, and said to be.
    """
    loaded = load(recipe, overrides)
    planned = plan(loaded.recipe, home())
    steps = asked(planned, loaded)
    measuring, known = Measuring(planned), dict[str, Questions]()
    first = {step.name: step for step in reversed(steps) if step.kind == "evaluate"}
    for name, step in first.items():
        known[name] = counted(planned, measuring, step)
        if known[name].reason:
            say(f"{name}: left out, its questions are not here (KFUSE_DATA names a folder)")
    there = [s for s in steps if s.kind != "evaluate" or not known[s.name].reason]
    costs = works(planned, there, known, GPU, rates_of(planned, GPU))
    if recorded:
        costs = [_recorded(step, work) for step, work in zip(there, costs, strict=True)]
    pairs = list(zip(there, costs, strict=True))
    made = [pair for pair in pairs if pair[0].kind != "evaluate"]
    measured = [pair for pair in pairs if pair[0].kind == "evaluate"]
    return Recorded(planned, made, measured, _packs(measuring, measured))


def _recorded(step: Step, work: Work) -> Work:
    cost = (read_manifest(step.folder) or {}).get("cost") or {}
    return replace(work, seconds=cost.get("seconds"))


def _packs(measuring: Measuring, measured: Sequence[tuple[Step, Work]]) -> dict[str, int]:
    from harness.answering import packs

    first = {step.name: step for step, _ in reversed(measured)}
    return {name: len(packs(step, measuring.suite(step))) for name, step in first.items()}


def curve(costs: Recorded, gpu: bool) -> None:
    """Print a line for each number of workers, and the critical path of the last."""
    for workers in CURVE:
        jobs = costs.jobs(Machines(workers, gpu))
        widest = max(job.gpus for job in jobs.values())
        if widest > workers:
            say(f"{workers:>3} workers: too few for a training on {widest}")
            continue
        say(line(jobs, workers, gpu))
    chain, long = critical(jobs), max(paths(jobs).values())
    total = sum(job.seconds * width(job) for job in jobs.values())
    say(
        f"critical path {_span(long)} of {_span(total)} in all, so that no more than "
        f"{total / long:.0f} workers gain anything: {names(chain)}"
    )


def line(jobs: Mapping[str, Job], workers: int, gpu: bool) -> str:
    """What a simulation on so many workers came to."""
    outcome = simulate(jobs, Room(gpus=workers) if gpu else Room(cpus=workers))
    ideal = bound(jobs, workers)
    return (
        f"{workers:>3} workers: {_span(outcome.makespan)}, busy {utilisation(outcome, workers):.1%}"
        f"; no schedule takes less than {_span(ideal)}, {ideal / outcome.makespan:.1%} of it"
    )


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.1f} s"
