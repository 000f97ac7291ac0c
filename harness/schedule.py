"""In which order jobs go, and how long they then take: longest path first.

The same choice is made in a real run and in the simulation. A chain is jobs that wait for each
other; a job's path is the longest chain that begins with it, in seconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

    def more(self, job: Job) -> Room:
        """What is free once a job is over."""
        gpus, memory = self.gpus + job.gpus, self.memory + job.memory
        return Room(self.cpus + job.cpus, gpus, memory)

    def fits(self, job: Job) -> bool:
        """Whether a job finds what it needs; what it does not need may be overdrawn."""
        left = self.less(job)
        pairs = ((job.cpus, left.cpus), (job.gpus, left.gpus), (job.memory, left.memory))
        return all(rest >= 0 for need, rest in pairs if need)


@dataclass
class Waiting:
    """Jobs that have not begun: what each still waits for, and the order in which they may begin.

    Jobs with GPUs and those without stand in two lines, each by length of path, else as they came.
    The first that does not fit keeps its line waiting: a training on eight GPUs would else come
    last, after everything that is small.
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)  # names, also of what runs: what waits for them
    after: dict[str, list[str]] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    long: dict[str, float] = field(default_factory=dict)
    lines: tuple[list, list] = ([], [])
    number: dict[str, int] = field(default_factory=dict)  # by when they came

    def add(self, jobs: Sequence[Job]) -> None:
        """Take in jobs after those that they need, or in place of those of the same name.

        A need that is unknown, or over, is not waited for.
        """
        for job in jobs:
            self.jobs[job.name] = job
            self.number.setdefault(job.name, len(self.number))
            self.open.add(job.name)
        self.long = paths(self.jobs)
        self.after = {}
        for job in self.jobs.values():
            needs = {need for need in job.needs if need in self.open}
            self.waits[job.name] = len(needs)
            for need in needs:
                self.after.setdefault(need, []).append(job.name)
        self.lines = ([], [])
        for job in self.jobs.values():
            self._stand(job)

    def begin(self, room: Room) -> list[Job]:
        """The jobs that begin now, which wait no longer."""
        out = []
        for line in self.lines:
            while line:
                job = self.jobs.get(line[0][2])
                if job is not None and not room.fits(job):
                    room = room.less(job)  # and what it needs is not for the other line
                    break
                heapq.heappop(line)
                if job is not None:
                    room = room.less(job)
                    out.append(self.jobs.pop(job.name))
        return out

    def end(self, name: str) -> None:
        """A job is over: what stands on it may begin."""
        self.open.discard(name)
        for one in self.after.pop(name, []):
            self.waits[one] -= 1
            if one in self.jobs:
                self._stand(self.jobs[one])

    def drop(self, name: str) -> list[Job]:
        """Give up what stands on a job, and the job, if it has not begun; those given up."""
        out, names = [], [name]
        while names:
            one = names.pop()
            self.open.discard(one)
            if one in self.jobs:
                out.append(self.jobs.pop(one))
            names += self.after.pop(one, [])
        return out

    def ready(self) -> list[Job]:
        """The jobs that could begin."""
        return [job for job in self.jobs.values() if not self.waits[job.name]]

    def _stand(self, job: Job) -> None:
        if not self.waits[job.name]:
            line = self.lines[0 if job.gpus else 1]
            heapq.heappush(line, (-self.long[job.name], self.number[job.name], job.name))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation came to: seconds from begin to end, and worker-seconds of all jobs."""

    makespan: float
    busy: float


def paths(jobs: Mapping[str, Job]) -> dict[str, float]:
    """Seconds from each job's beginning to the end of the longest chain that begins with it."""
    after, waits = _following(jobs)
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


def _following(jobs: Mapping[str, Job]) -> tuple[dict[str, list[str]], dict[str, int]]:
    """By job: those that wait for it, and for how many it waits."""
    after: dict[str, list[str]] = {name: [] for name in jobs}
    waits = dict.fromkeys(jobs, 0)
    for job in jobs.values():
        for need in dict.fromkeys(job.needs):
            if need in jobs:
                after[need].append(job.name)
                waits[job.name] += 1
    return after, waits


def critical(jobs: Mapping[str, Job]) -> list[Job]:
    """The longest chain of all: no number of workers makes a plan shorter than that."""
    long, (after, _) = paths(jobs), _following(jobs)
    out, here = [], list(jobs)
    while here:
        name = max(here, key=lambda one: long[one])
        out.append(jobs[name])
        here = after[name]
    return out


def simulate(jobs: Mapping[str, Job], room: Room) -> Outcome:
    """Carry out jobs that take what they are forecast to take; RunError if one never fits."""
    waiting = Waiting()
    waiting.add(list(jobs.values()))
    running: list[tuple[float, int, Job]] = []
    now, busy, count = 0.0, 0.0, 0
    while waiting.jobs or running:
        for job in waiting.begin(room):
            room = room.less(job)
            count += 1
            heapq.heappush(running, (now + job.seconds, count, job))
            busy += job.seconds * width(job)
        if not running:
            stuck = waiting.ready()[0]
            raise RunError(f"{stuck}: needs {stuck.gpus} GPUs and {stuck.cpus} CPUs at once")
        now, _, ended = heapq.heappop(running)
        room = room.more(ended)
        waiting.end(ended.name)
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
