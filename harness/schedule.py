"""In which order jobs go, and how long they then take: longest path first.

The same choice is made in a real run and in the simulation. A chain is jobs that wait for each
other; a job's path is the longest chain that begins with it, in seconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from fusion.errors import RunError
from harness.jobs import Job


@dataclass(frozen=True, slots=True)
class Room:
    """What is free: processors, GPUs, bytes of memory."""

    cpus: float = inf
    gpus: float = inf
    memory: float = inf

    def less(self, job: Job) -> Room:
        """What a job leaves; below 0 where it does not fit."""
        gpus, memory = self.gpus - job.gpus, self.memory - job.memory
        return Room(self.cpus - job.cpus, gpus, memory)

    def fits(self, job: Job) -> bool:
        """Whether a job finds what it needs; what it does not need may be overdrawn."""
        left = self.less(job)
        pairs = ((job.cpus, left.cpus), (job.gpus, left.gpus), (job.memory, left.memory))
        return all(rest >= 0 for need, rest in pairs if need)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation came to: seconds from begin to end, and worker-seconds of all jobs."""

    makespan: float
    busy: float


def paths(jobs: Mapping[str, Job]) -> dict[str, float]:
    """Seconds from each job's beginning to the end of the longest chain that begins with it."""
    after: dict[str, list[str]] = {name: [] for name in jobs}
    waits = {name: 0 for name in jobs}
    for job in jobs.values():
        for need in dict.fromkeys(job.needs):
            if need in jobs:
                after[need].append(job.name)
                waits[job.name] += 1
    order = [name for name, count in waits.items() if not count]
    for name in order:
        for one in after[name]:
            waits[one] -= 1
            if not waits[one]:
                order.append(one)
    if len(order) < len(jobs):
        raise RunError(f"{len(jobs) - len(order)} jobs wait for each other in a circle")
    out: dict[str, float] = {}
    for name in reversed(order):
        out[name] = jobs[name].seconds + max((out[one] for one in after[name]), default=0.0)
    return out


def critical(jobs: Mapping[str, Job]) -> list[Job]:
    """The longest chain of all: no number of workers makes a plan shorter than that."""
    long = paths(jobs)
    after: dict[str, list[str]] = {name: [] for name in jobs}
    for job in jobs.values():
        for need in job.needs:
            if need in jobs:
                after[need].append(job.name)
    out, here = [], list(jobs)
    while here:
        name = max(here, key=lambda one: long[one])
        out.append(jobs[name])
        here = after[name]
    return out


def chosen(ready: Iterable[Job], room: Room, long: Mapping[str, float]) -> list[Job]:
    """The ready jobs that begin now.

    Longest path first, else as they come. One that does not fit keeps what it needs from those
    after it: a training on eight GPUs would else wait until nothing smaller is left.
    """
    out = []
    for job in sorted(ready, key=lambda job: -long[job.name]):
        if room.fits(job):
            out.append(job)
        room = room.less(job)
    return out


def simulate(jobs: Mapping[str, Job], room: Room) -> Outcome:
    """Carry out jobs that take what they are forecast to take; RunError if one never fits."""
    long = paths(jobs)
    waiting, done = dict(jobs), set[str]()
    running: list[tuple[float, int, Job]] = []
    now, busy, count = 0.0, 0.0, 0
    while waiting or running:
        ready = [j for j in waiting.values() if done.issuperset(n for n in j.needs if n in jobs)]
        for job in chosen(ready, room, long):
            del waiting[job.name]
            room = room.less(job)
            count += 1
            heapq.heappush(running, (now + job.seconds, count, job))
            busy += job.seconds * width(job)
        if not running:
            stuck = next(iter(waiting.values()))
            raise RunError(f"{stuck}: needs {stuck.gpus} GPUs and {stuck.cpus} CPUs at once")
        now, _, ended = heapq.heappop(running)
        done.add(ended.name)
        freed = replace(ended, cpus=-ended.cpus, gpus=-ended.gpus, memory=-ended.memory)
        room = room.less(freed)
    return Outcome(now, busy)


def width(job: Job) -> int:
    """Workers that a job holds: its GPUs, or one where it has none."""
    return max(1, job.gpus)


def bound(jobs: Mapping[str, Job], workers: int) -> float:
    """Seconds that no schedule on so many workers can go below."""
    total = sum(job.seconds * width(job) for job in jobs.values())
    return max(total / workers, max(paths(jobs).values(), default=0.0))


def utilisation(outcome: Outcome, workers: int) -> float:
    """The share of the workers' time that jobs took."""
    return outcome.busy / (workers * outcome.makespan) if outcome.makespan else 1.0


def names(chain: Sequence[Job]) -> str:
    """A chain in a line, jobs that take no time left out."""
    return " → ".join(f"{job} ({job.seconds:,.0f} s)" for job in chain if job.seconds)
