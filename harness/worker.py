"""What one worker of a Ray cluster does with one job: what a local run does, in the same store.

A reason that a person can mend comes back as text; where a machine is not like the one that asks
(no such store, other versions), that comes back as what is unfit, and ends the run.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import RecipeError, RunError

if TYPE_CHECKING:
    from harness.jobs import Job
    from harness.measuring import Measuring
    from harness.plan import Plan
    from harness.questions import Questions

PATIENCE = 60.0  # seconds until what another machine has written must be seen here
INHERITED = ("KFUSE_", "HF_", "OMP_", "MKL_", "TOKENIZERS_")  # beginnings of environment variables
OWN = ("KFUSE_MIRROR",)  # what each machine says for itself
_kept: dict[str, Measuring] = {}


@dataclass(frozen=True, slots=True)
class Setting:
    """What every worker shares with the command: environment, versions, a file in the store."""

    environment: dict[str, str]
    threads: int
    made_by: dict[str, Any]
    sign: Path

    @classmethod
    def here(cls, sign: Path) -> Setting:
        """The command's own."""
        import torch

        from harness.store import provenance

        known = {k: v for k, v in os.environ.items() if k.startswith(INHERITED) and k not in OWN}
        return cls(known, torch.get_num_threads(), provenance(), sign)


@dataclass(frozen=True, slots=True)
class Done:
    """How a job ended: why it failed, or why this machine is unfit; where, and for how long."""

    reason: str | None
    unfit: str | None = None
    host: str = ""
    seconds: float = 0.0
    packs: int = 0  # of a suite
    questions: Questions | None = None


def do(plan: Plan, job: Job, setting: Setting) -> Done:
    """Carry out one job; no exception but those that end the process."""
    started, host = time.monotonic(), socket.gethostname()
    _settle(setting)
    try:
        if unfit := _unfit(setting, host):
            return Done(None, unfit, host)
        plan, job = _here(plan, job)
        _see(plan, job)
        found = WORK[job.work](plan, job)
    except (RecipeError, RunError, OSError) as error:
        return Done(str(error), None, host, time.monotonic() - started)
    except Exception as error:  # a mistake of ours: the other jobs go on
        traceback.print_exc()
        return Done(f"{type(error).__name__}: {error}", None, host, time.monotonic() - started)
    return Done(host=host, seconds=time.monotonic() - started, **{"reason": None, **found})


def _settle(setting: Setting) -> None:
    """Take over the command's environment: Ray sets threads of its own, which move last digits."""
    for name in [name for name in os.environ if name.startswith(INHERITED)]:
        if name not in setting.environment and name not in OWN:
            del os.environ[name]
    os.environ.update(setting.environment)
    import torch

    torch.set_num_threads(setting.threads)


def _unfit(setting: Setting, host: str) -> str | None:
    """Why what is made here would not be what the command makes."""
    from harness.store import unlike

    try:
        seen = _seen(setting.sign)
    except RunError as error:  # of an object store
        return f"{host}: {error}"
    if not seen:
        return (
            f"{host}: does not see the store {setting.sign.parent.parent}; set KFUSE_HOME to a "
            "folder that all nodes have under the same path"
        )
    return unlike(setting.made_by)


def _seen(sign: Path) -> bool:
    """Whether the command's file in the store is seen here."""
    from harness import objects
    from harness.store import home, url

    if url() is None:
        return sign.exists()
    with suppress(FileNotFoundError):
        return bool(objects.read(home() / sign.parent.name / sign.name))
    return False


def _here(plan: Plan, job: Job) -> tuple[Plan, Job]:
    """A plan and its job in this machine's mirror; in a shared folder they are as they are."""
    from harness.steps import moved
    from harness.store import home, url

    if url() is None or plan.home == home():
        return plan, job
    plan = moved(plan, home())
    return plan, replace(job, step=plan.steps[job.step.identity])


def _see(plan: Plan, job: Job) -> None:
    """Wait until the store shows here what other machines have finished there."""
    from harness import mirror
    from harness.store import read_manifest

    mirror.learn(plan.home, job.step.folder)
    deadline = time.monotonic() + PATIENCE
    if job.step.folder.is_dir():
        os.listdir(job.step.folder)  # asks the server, in place of what is remembered
    for name in job.needs:
        step = plan.steps.get(name)
        if step:
            mirror.learn(plan.home, step.folder)
        while step and read_manifest(step.folder) is None:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{step.folder}: was finished on another machine and is not seen on "
                    f"{socket.gethostname()} after {PATIENCE:.0f} s; is KFUSE_HOME a shared folder?"
                )
            time.sleep(0.5)
            if step.folder.parent.is_dir():
                os.listdir(step.folder.parent)
            mirror.learn(plan.home, step.folder)


def _make(plan: Plan, job: Job) -> Mapping[str, Any]:
    from harness.build import make

    return {"reason": make(plan, job.step)}


def _capture(plan: Plan, job: Job) -> Mapping[str, Any]:
    from harness import mirror
    from harness.capturing import capture_share

    mirror.bring(plan.steps[job.step.content["corpus"]].folder)
    capture_share(plan, job.step, job.share, job.shares)
    return {}


def _measuring(plan: Plan) -> Measuring:
    """This process's `Measuring` of a plan: suites are loaded once, models for a job at a time."""
    from harness.measuring import Measuring
    from harness.store import identity

    key = identity([str(plan.home), *plan.steps])
    if key not in _kept:
        _kept.clear()
        _kept[key] = Measuring(plan)
    return _kept[key]


def _questions(plan: Plan, job: Job) -> Mapping[str, Any]:
    from harness.answering import packs
    from harness.questions import counted

    measuring = _measuring(plan)
    found = packs(job.step, measuring.suite(job.step))
    return {"packs": len(found), "questions": counted(plan, measuring, job.step)}


def _answer(plan: Plan, job: Job) -> Mapping[str, Any]:
    measuring = _measuring(plan)
    try:
        measuring.answer(job.row, job.step, job.share, job.shares)
    finally:
        measuring.release()  # the next job here may be a training
    return {}


def _score(plan: Plan, job: Job) -> Mapping[str, Any]:
    _measuring(plan).score(job.step)
    return {}


WORK: Mapping[str, Callable[[Plan, Job], Mapping[str, Any]]] = {
    "make": _make,
    "capture": _capture,
    "questions": _questions,
    "answer": _answer,
    "score": _score,
}
