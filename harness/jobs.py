"""A plan's steps as jobs: what one worker does at a time, after what, for how long, with what.

A capture is shared out by block, a measurement by request, everything else is one job a step. The
job that ends a step bears the step's identity, so that what stands on the step waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from harness.capturing import CHUNK
from harness.plan import Plan, Step, suite_of
from harness.status import needs as needs_of

if TYPE_CHECKING:
    from harness.forecast import Work

PACKS = 2  # packs of a measurement that are worth opening a model for
UNKNOWN = 1.0  # seconds of what no forecast knows
MODELS = ("capture", "train", "statistics")  # kinds of builds that run models


@dataclass(frozen=True, slots=True)
class Job:
    """What one worker does at a time. seconds: as forecast; memory: in bytes, of models alone."""

    name: str
    work: Literal["make", "capture", "questions", "answer", "score"]
    step: Step
    row: str
    needs: tuple[str, ...] = ()  # names of jobs
    seconds: float = UNKNOWN
    cpus: int = 1
    gpus: int = 0
    memory: int = 0
    share: int = 0
    shares: int = 1

    def __str__(self) -> str:
        row = f"{self.row} · " if self.step.kind == "evaluate" and self.work != "questions" else ""
        what = f"{self.step.kind} {row}{self.step.name}"
        if self.shares > 1:
            return f"{what}, share {self.share + 1} of {self.shares}"
        ends = {"questions": "questions of ", "score": "scores of "}
        return ends.get(self.work, "") + (self.step.name if self.work == "questions" else what)


@dataclass(frozen=True, slots=True)
class Machines:
    """What there is to work with: jobs with a model that run side by side, on what, how."""

    slots: int
    gpu: bool  # whether models run on GPUs
    threads: int = 1  # that torch computes with where they do not


def builds(
    plan: Plan, steps: Sequence[Step], works: Sequence[Work | None], machines: Machines
) -> list[Job]:
    """The jobs of steps that make something; works: what each takes, if it is known."""
    out = []
    for step, work in zip(steps, works, strict=True):
        row, wide = step.rows[0], _gpus(plan, step, machines)
        seconds = _seconds(work) / max(1, wide)
        memory = (work.memory if work else None) or 0
        cpus = _cpus(plan, step, machines)
        common = {"cpus": cpus, "gpus": wide, "memory": memory}
        after = tuple(needs_of(plan, step))
        shares = _shares(plan, step, machines)
        if shares > 1:
            first = [
                Job(
                    f"{step.identity}:{share}",
                    "capture",
                    step,
                    row,
                    after,
                    seconds / shares,
                    share=share,
                    shares=shares,
                    **common,
                )
                for share in range(shares)
            ]
            out += first
            last = tuple(job.name for job in first)
            # It captures what a share has left, so it holds what they held.
            out.append(Job(step.identity, "make", step, row, (*after, *last), 0.0, **common))
        else:
            out.append(Job(step.identity, "make", step, row, after, seconds, **common))
    return out


def questions(plan: Plan, steps: Sequence[Step]) -> list[Job]:
    """A job for each suite that fetches its data and counts its packs."""
    first = {step.name: step for step in reversed(steps)}
    return [Job(f"questions:{n}", "questions", first[n], first[n].rows[0]) for n in first]


def measurement(
    plan: Plan, row: str, step: Step, packs: int, work: Work | None, machines: Machines
) -> list[Job]:
    """The jobs of one row on one suite, whose questions come to so many packs."""
    after = [*needs_of(plan, step), f"questions:{step.name}"]
    shares = max(1, min(machines.slots, packs // PACKS))
    wide, memory = int(machines.gpu), (work.memory if work else None) or 0
    cpus = 1 if machines.gpu else machines.threads
    out = [
        Job(
            f"{step.identity}:{share}",
            "answer",
            step,
            row,
            tuple(after),
            _seconds(work) / shares,
            cpus,
            wide,
            memory,
            share,
            shares,
        )
        for share in range(shares)
    ]
    after += [job.name for job in out]
    suite, judge = suite_of(step.name), plan.recipe.evaluate.judge
    judged = bool(suite and suite.judged and judge and judge.model in plan.recipe.sources)
    if judged and judge:
        after.append(plan.identities[judge.model])
    runs = bool(suite and suite.executes_code)  # programs, on as many cores as there are
    cpus = machines.threads if runs or judged else 1
    wide = int(machines.gpu and judged)
    out.append(Job(step.identity, "score", step, row, tuple(after), 0.0, cpus, wide))
    return out


def _seconds(work: Work | None) -> float:
    return UNKNOWN if work is None or work.seconds is None else work.seconds


def _shares(plan: Plan, step: Step, machines: Machines) -> int:
    """How many share a capture: no more than it has chunks, as far as the recipe tells."""
    corpus = plan.recipe.corpus
    if step.kind != "capture" or not corpus:
        return 1
    blocks = -(-corpus.tokens // corpus.blocks)
    return max(1, min(machines.slots, -(-blocks // CHUNK)))


def _gpus(plan: Plan, step: Step, machines: Machines) -> int:
    if not machines.gpu or step.kind not in MODELS:
        return 0
    return plan.recipe.machine.processes if step.kind == "train" else 1


def _cpus(plan: Plan, step: Step, machines: Machines) -> int:
    processes = plan.recipe.machine.processes if step.kind == "train" else 1
    return processes if machines.gpu else max(processes, machines.threads)
