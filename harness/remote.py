"""`--executor ray`: the jobs of a plan as tasks of a Ray cluster, in a store that all nodes share.

Ray carries a job to a machine and tells how it ended; all else is in the store. A worker or a node
that is lost takes with it what it had in hand, and the job is given to another, which goes on from
what is in the store. If this command ends, whenever, the next one goes on in the same way.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from fusion.errors import RecipeError, RunError
from harness import mirror, objects
from harness.build import forget_failure, needed, note_failure
from harness.jobs import Job, Machines, builds, measurement, questions
from harness.plan import Plan, Step
from harness.progress import say
from harness.schedule import Room, Waiting
from harness.store import write_json
from harness.worker import Done, Setting, do

TRIES = 4  # of a job whose worker or node is lost each time
STORE_BYTES = 80 * 2**20  # of Ray's own memory for objects: plans are all that goes through it


def require() -> None:
    """RunError if Ray is not installed; it is not loaded."""
    if find_spec("ray") is None:
        raise RunError("--executor ray: Ray is not installed; pip install 'kfuse[ray]'")


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected: to an address, to RAY_ADDRESS, or to a cluster of this machine alone."""
    require()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        common |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        _reach(address)
    except OSError as error:
        raise RunError(
            f"--address {address}: no Ray cluster answers ({error}); start "
            "one with `ray start --head`, or leave the address out for this machine alone"
        ) from error
    try:
        ray.init(address=address, **common)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        if address == "local":
            raise RunError(
                f"--executor ray: Ray does not start on this machine ({what})"
            ) from error
        raise RunError(
            f"--address {address}: this machine did not get into a Ray cluster there "
            f"({what}). Is it a cluster of Ray {ray.__version__}? If its "
            "head has a file ~/.ray/auth_token it asks for that: bring it here, and say "
            "RAY_AUTH_MODE=token before this command"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """OSError if nothing listens at HOST:PORT, for which Ray itself would look for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def carry_out(
    ray: Any, plan: Plan, rows: Sequence[str], steps: Sequence[Step], todo: Mapping[str, list[Step]]
) -> dict[str, str]:
    """Build and measure on the cluster; reasons by row, or "row/suite", for what could not be.

    steps: what is to be made; todo: measurements by row. RunError if a node is unfit.
    """
    sign = plan.home / "running" / f"sweep.{socket.gethostname()}.{os.getpid()}"
    plan.home.joinpath("running").mkdir(parents=True, exist_ok=True)
    write_json(sign, {"rows": list(rows)})
    if objects.name_of(sign):
        objects.write(sign, sign.read_text())
    try:
        sweep = Sweep(ray, plan, rows, steps, todo, Setting.here(sign))
        sweep.run()
        mirror.learn(plan.home)
        return sweep.reasons()
    finally:
        with suppress(OSError, RunError):
            sign.unlink(missing_ok=True)
            if objects.name_of(sign):
                objects.remove(sign)


@dataclass
class Sweep:
    """The jobs of one command: which wait, run, are done, and have failed."""

    ray: Any
    plan: Plan
    rows: Sequence[str]
    steps: Sequence[Step]
    todo: Mapping[str, list[Step]]
    setting: Setting
    waiting: Waiting = field(default_factory=Waiting)
    done: set[str] = field(default_factory=set)  # names of jobs
    failed: dict[str, str] = field(default_factory=dict)  # by job
    running: dict[Any, Job] = field(default_factory=dict)  # by Ray's reference
    tries: dict[str, int] = field(default_factory=dict)
    known: dict[str, Done] = field(default_factory=dict)  # by suite: what is asked
    largest: Room = Room(0, 0, 0)  # the best that a node has had of each
    busy: float = 0.0

    def __post_init__(self) -> None:
        machine = self.plan.recipe.machine
        total = self._room()
        gpu = machine.device.startswith("cuda") or (machine.device == "auto" and total.gpus > 0)
        if machine.device not in ("auto", "cpu", "cuda"):
            raise RecipeError(
                f"machine.device: {machine.device} is a GPU of one machine; with --executor ray "
                "say auto, cpu or cuda"
            )
        if not total.cpus:
            raise RunError("--executor ray: no node of the cluster has processors; add a node")
        if gpu and not total.gpus:
            raise RunError("machine.device: cuda asked for, but no node has a GPU; try auto")
        slots = total.gpus if gpu else total.cpus // self.setting.threads
        self.machines = Machines(max(1, int(slots)), gpu, self.setting.threads)
        settled = machine.model_copy(update={"device": "cuda" if gpu else "cpu"})
        self.plan = replace(
            self.plan, recipe=self.plan.recipe.model_copy(update={"machine": settled})
        )
        self.shared = self.ray.put(self.plan)
        self.task = self.ray.remote(do)

    def run(self) -> None:
        """Until nothing is left that could run."""
        started = time.monotonic()
        measured = [step for _, step in self._measured()]
        for step in [*self.steps, *measured]:
            forget_failure(step)
        self._forecast()
        self.add(questions(self.plan, measured))
        slots = self.machines.slots
        say(f"ray: up to {slots} jobs with a model side by side; `kfuse status` tells what runs")
        told = False
        try:
            while self.running or self.waiting.jobs:
                self._submit()
                if not self.running:
                    if not told:
                        say("ray: no node has room for what is left; waiting for one")
                    told = True
                    time.sleep(1.0)
                    continue
                ended, _ = self.ray.wait(list(self.running), timeout=1.0)
                for reference in ended:
                    self._end(reference, self.running.pop(reference))
        finally:
            for reference in self.running:
                self.ray.cancel(reference, force=True)
        seconds = time.monotonic() - started
        share = self.busy / (seconds * slots)
        say(f"ray: {len(self.done)} jobs in {seconds:.1f} s, workers busy {share:.0%} of it")

    def add(self, jobs: Sequence[Job]) -> None:
        """Take in jobs, but those that need what has failed, or more than a node has."""
        cores = max(1, int(self.largest.cpus))  # which threads may share
        jobs = [replace(job, cpus=min(job.cpus, cores)) for job in jobs]
        for job in jobs:
            if reason := next((self.failed[n] for n in job.needs if n in self.failed), None):
                self.failed[job.name] = reason
        self.waiting.add([job for job in jobs if job.name not in self.failed])
        for job in jobs:
            large = self.largest.gpus < job.gpus or self.largest.memory < job.memory
            if large and job.name not in self.failed:
                self._fail(job, self._too_large(job))

    def reasons(self) -> dict[str, str]:
        """Why rows were not built, and rows that are built not measured."""
        from harness.measuring import failures, unbuilt

        keys = self.plan.identities
        out = {row: self.failed[keys[row]] for row in self.rows if keys[row] in self.failed}
        todo = {row: steps for row, steps in self.todo.items() if row not in out}
        for row, steps in todo.items():
            if missing := unbuilt(self.plan, row):
                for step in steps:
                    note_failure(step, f"not measured: not built: {', '.join(missing)}")
        return out | failures(todo)

    def _measured(self) -> list[tuple[str, Step]]:
        """Rows and measurements, but of rows whose models are neither there nor to be built."""
        from harness.measuring import unbuilt

        built = {step.identity for step in self.steps}
        keys = self.plan.identities
        return [
            (row, step)
            for row, steps in self.todo.items()
            if all(keys[model] in built for model in unbuilt(self.plan, row))
            for step in steps
        ]

    def _forecast(self) -> None:
        """Add the jobs of builds, or know better what those take that have not begun."""
        found = builds(self.plan, self.steps, self._works(self.steps), self.machines)
        begun = {job.name for job in self.running.values()} | self.done | set(self.failed)
        self.add([job for job in found if job.name not in begun])

    def _submit(self) -> None:
        """Give to Ray what fits beside what runs, longest path first."""
        room = self._room()
        for job in self.running.values():
            room = room.less(job)
        for job in self.waiting.begin(room):
            options = {"num_cpus": job.cpus, "num_gpus": job.gpus, "memory": job.memory}
            task = self.task.options(max_retries=0, name=str(job), **options)
            self.running[task.remote(self.shared, job, self.setting)] = job

    def _room(self) -> Room:
        """What living nodes have together; a node that is lost may come again as it was.

        One without processors, as a head often is, is given nothing.
        """
        found = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        found = [node for node in found if node.get("CPU")]
        each = [[node.get(key, 0.0) for node in found] for key in ("CPU", "GPU", "memory")]
        most = (self.largest.cpus, self.largest.gpus, self.largest.memory)
        self.largest = Room(*(max([best, *has]) for best, has in zip(most, each, strict=True)))
        return Room(*map(sum, each))

    def _end(self, reference: Any, job: Job) -> None:
        """Take in how a job ended; one whose worker or node is lost is tried again."""
        from ray.exceptions import RayError, RayTaskError

        try:
            found: Done = self.ray.get(reference)
        except RayTaskError as error:
            raise RunError(f"{job}: a worker could not begin ({error.cause or error})") from error
        except RayError as error:
            self.tries[job.name] = self.tries.get(job.name, 0) + 1
            what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            if self.tries[job.name] >= TRIES:
                self._fail(job, f"its worker was lost {TRIES} times ({what})")
            else:
                say(f"{job}: its worker was lost ({what}); given to another")
                self.waiting.add([job])
            return
        if found.unfit:
            raise RunError(found.unfit)
        held = job.gpus if self.machines.gpu else job.cpus / self.machines.threads
        self.busy += found.seconds * held
        if found.reason:
            self._fail(job, found.reason)
            return
        self.done.add(job.name)
        self.waiting.end(job.name)
        say(f"{job}: {found.seconds:.1f} s on {found.host}")
        if job.step.kind == "fetch":
            self._forecast()
        if job.work == "questions":
            self.known[job.step.name] = found
            self._measure(job.step.name)

    def _measure(self, suite: str) -> None:
        """Add the measurements of a suite, now that it is known how much is asked."""
        found = [(row, step) for row, step in self._measured() if step.name == suite]
        works, packs = self._works([step for _, step in found]), self.known[suite].packs
        self.add(
            [
                job
                for (row, step), work in zip(found, works, strict=True)
                for job in measurement(self.plan, row, step, packs, work, self.machines)
            ]
        )

    def _works(self, steps: Sequence[Step]) -> list[Any]:
        """What steps take, by the data sheet of one GPU: only their order counts."""
        from harness.forecast import rates_of, works

        asked = {name: done.questions for name, done in self.known.items() if done.questions}
        where = "cuda" if self.machines.gpu else "cpu"
        return list(works(self.plan, steps, asked, where, rates_of(self.plan, "a100")))

    def _fail(self, job: Job, reason: str) -> None:
        """Keep why a job failed, and with it all that needs it."""
        say(f"{job}: {reason}")
        mirror.learn(self.plan.home, job.step.folder)
        if job.step.kind == "evaluate":
            alone = job.work != "questions"
            for _, step in [(job.row, job.step)] if alone else self._measured():
                if alone or step.name == job.step.name:
                    note_failure(step, f"not measured: {reason}")
        elif job.work != "make" or not job.step.failure:  # else the stage has said it itself
            note_failure(job.step, reason)
            reason = f"{job.step.kind} {job.step.name} failed: {reason}"
        self.failed[job.name] = reason
        others = [one.name for one in self.waiting.jobs.values() if one.step == job.step]
        for name in (job.name, *others):  # with what others were to do of the same step
            for other in self.waiting.drop(name):
                self.failed.setdefault(other.name, reason)

    def _too_large(self, job: Job) -> str:
        largest, gib = self.largest, 2**30
        return (
            f"needs {job.gpus} GPUs and {job.memory / gib:.1f} GiB of memory on one node; the "
            f"largest has {largest.gpus:.0f} GPUs and {largest.memory / gib:.1f} GiB"
        )


def wanted(plan: Plan, rows: Sequence[str]) -> list[Step]:
    """The steps that these rows stand on and that are not done."""
    needs = needed(plan, rows)
    return [step for step in plan.builds() if step.identity in needs and not step.done]
