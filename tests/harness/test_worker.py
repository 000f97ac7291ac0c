"""What a worker does with a job that goes wrong, and with a store that shows things late."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from fusion.errors import RunError
from harness import mirror, objects, worker
from harness.jobs import Job
from harness.plan import Plan, plan
from harness.recipe import load
from harness.store import finish, home
from harness.worker import Setting, do


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    return plan(load("tiny").recipe, tmp_path)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """As a command gives it, whose sign lies in the store."""
    sign = tmp_path / "running" / "sweep"
    sign.parent.mkdir()
    sign.touch()
    return Setting.here(sign)


def first(planned: Plan, kind: str) -> Job:
    step = next(step for step in planned.builds() if step.kind == kind)
    return Job(step.identity, "make", step, step.rows[0], step.needs)


def test_a_job_is_done_as_a_local_run_does_it(planned: Plan, setting: Setting) -> None:
    job = first(planned, "fetch")
    done = do(planned, job, setting)
    assert done.reason is None
    assert done.unfit is None
    assert done.seconds > 0
    assert job.step.done
    assert do(planned, job, setting).seconds < done.seconds, "it is done"


def test_a_mistake_of_ours_is_a_reason_like_any_other(
    planned: Plan, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> dict:
        raise ZeroDivisionError("by zero")

    monkeypatch.setitem(worker.WORK, "make", broken)  # type: ignore[arg-type]
    assert do(planned, first(planned, "fetch"), setting).reason == "ZeroDivisionError: by zero"


def test_what_another_machine_has_finished_may_be_seen_late(
    planned: Plan, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = first(planned, "pack")
    (need,) = job.needs
    folder = planned.steps[need].folder
    monkeypatch.setitem(worker.WORK, "make", lambda *_: {})  # type: ignore[arg-type]
    monkeypatch.setattr(worker, "PATIENCE", 0.1)
    reason = do(planned, job, setting).reason
    assert reason
    assert "is KFUSE_HOME a shared folder?" in reason
    monkeypatch.setattr(worker, "PATIENCE", 60.0)

    def late() -> None:
        time.sleep(0.2)
        folder.mkdir(parents=True)
        finish(folder, {})

    thread = threading.Thread(target=late)
    thread.start()
    assert do(planned, job, setting).reason is None
    thread.join()


def test_the_environment_is_the_commands(
    planned: Plan, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(worker.WORK, "make", lambda *_: {})  # type: ignore[arg-type]
    own = replace(setting, environment={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    rays = {"OMP_NUM_THREADS": "7", "KFUSE_SANDBOX": "process"}
    with patch.dict(os.environ, rays):
        do(planned, first(planned, "fetch"), own)
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert "KFUSE_SANDBOX" not in os.environ


def test_a_node_outside_a_checkout_knows_no_commit(planned: Plan, setting: Setting) -> None:
    unknown = replace(setting, made_by=setting.made_by | {"commit": None})
    assert do(planned, first(planned, "fetch"), unknown).unfit is None
    packages = setting.made_by["packages"] | {"numpy": "0.1"}
    other = replace(setting, made_by=setting.made_by | {"packages": packages})
    assert "numpy" in (do(planned, first(planned, "fetch"), other).unfit or "")


def test_a_worker_has_a_mirror_of_its_own_and_tells_why_it_cannot_see_the_store(
    store: Path, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = at("command")
    planned = plan(load("tiny").recipe, home())
    sign = command / "running" / "sweep"
    setting = Setting.here(sign)
    assert "KFUSE_MIRROR" not in setting.environment
    job, pack = first(planned, "fetch"), first(planned, "pack")
    node = at("node")
    assert "does not see the store" in str(do(planned, job, setting).unfit)
    objects.write(node / "running" / "sweep", "{}")
    done = do(planned, job, setting)
    assert (done.reason, done.unfit) == (None, None)
    assert list(node.glob("models/*/model.safetensors"))
    assert not list(command.glob("models/*"))
    other = at("other")
    assert do(planned, pack, setting).reason is None
    assert list(other.glob("models/*/model.safetensors"))
    at("command")
    assert not pack.step.done
    mirror.learn(home())
    assert pack.step.done

    def broken(*_: object) -> dict:
        raise RunError("no room")

    monkeypatch.setitem(worker.WORK, "make", broken)  # type: ignore[arg-type]
    at("node")
    assert do(planned, job, setting).reason == "no room"
