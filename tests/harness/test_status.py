"""What `kfuse status` reads from a store: finished, running, lost, failed and waiting jobs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.plan import plan
from harness.progress import LOST
from harness.recipe import load
from harness.run import asked
from harness.status import Job, jobs, summary, table
from harness.steps import Plan
from harness.store import finish, space, write_json


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    return plan(load("tiny").recipe, tmp_path)


def states(planned: Plan) -> dict[str, Job]:
    found = jobs(planned, asked(planned, load("tiny")))
    return {f"{job.step.kind} {job.step.name}": job for job in found}


def sign(planned: Plan, folder: str, **facts: object) -> Path:
    path = planned.home / "running" / f"{folder}.json"
    path.parent.mkdir(exist_ok=True)
    now = time.time()
    content = {"folder": folder, "host": socket.gethostname(), "pid": os.getpid()}
    content |= {"space": space()}
    write_json(path, content | {"since": now - 60, "seen": now} | facts)
    return path


def written_before(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_jobs_wait_for_what_they_stand_on(planned: Plan) -> None:
    found = states(planned)
    assert found["fetch llama"].state == "ready"
    trained = found["train clm"]
    assert trained.state == "waiting"
    assert "pack corpus" in trained.detail
    assert found["merge merged"].detail.startswith("for train clm")
    mixed = [j for j in jobs(planned, asked(planned, load("tiny"))) if j.step.rows == ("pack",)]
    assert {job.state for job in mixed if job.step.kind == "evaluate"} == {"waiting"}
    assert "fetch llama" in mixed[-1].detail
    assert "not counted" in summary(list(found.values()))


def test_a_finished_job_tells_how_long_others_like_it_will_take(planned: Plan) -> None:
    first, second = (s for s in planned.builds() if s.kind == "fetch" and s.name != "neox")
    first.folder.mkdir(parents=True)
    finish(first.folder, {"cost": {"seconds": 90.0}})
    found = states(planned)
    assert (found["fetch llama"].state, found["fetch llama"].seconds) == ("done", 90.0)
    assert found[f"fetch {second.name}"].seconds == 90.0
    assert found["train clm"].seconds is None


@pytest.mark.parametrize(
    ("facts", "age", "state"),
    [
        ({}, 0, "running"),
        ({}, 2 * LOST, "lost"),
        ({"host": "elsewhere", "pid": 1}, 0, "running"),
        ({"host": "elsewhere", "pid": 1}, 2 * LOST, "lost"),
        ({"space": "another container's", "pid": 4_999_999}, 0, "running"),
        ({"space": "another container's", "pid": 4_999_999}, 2 * LOST, "lost"),
        # By the clock of another machine, which is not this one's.
        ({"host": "elsewhere", "pid": 1, "seen": time.time() - 2 * LOST}, 0, "running"),
        ({"host": "elsewhere", "pid": 1, "seen": time.time() + 2 * LOST}, 2 * LOST, "lost"),
    ],
)
def test_a_sign_of_life_must_be_fresh(planned: Plan, facts: dict, age: float, state: str) -> None:
    step = next(s for s in planned.builds() if s.kind == "fetch")
    written_before(sign(planned, step.folder.name, **facts), age)
    assert states(planned)[f"fetch {step.name}"].state == state


def test_a_process_that_is_gone_is_lost_at_once(planned: Plan) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    step = next(s for s in planned.builds() if s.kind == "fetch")
    sign(planned, step.folder.name, pid=process.pid)
    job = states(planned)[f"fetch {step.name}"]
    assert job.state == "lost"
    assert "goes on from there" in job.detail


def test_running_work_ends_by_how_far_it_is(planned: Plan) -> None:
    step = next(s for s in planned.builds() if s.kind == "fetch")
    sign(planned, step.folder.name, done=25, total=100)
    job = states(planned)[f"fetch {step.name}"]
    assert job.seconds == pytest.approx(180, rel=0.05)
    assert job.detail.startswith("25 of 100, 1 min on ")


def test_while_none_is_done_others_take_what_a_running_one_will(planned: Plan) -> None:
    one, other = [s for s in planned.builds() if s.kind == "fetch"][:2]
    assert states(planned)[f"fetch {other.name}"].seconds is None
    sign(planned, one.folder.name, done=25, total=100)
    assert states(planned)[f"fetch {other.name}"].seconds == pytest.approx(240, rel=0.05)
    other.folder.mkdir(parents=True)
    finish(other.folder, {"cost": {"seconds": 7.0}})
    assert states(planned)[f"fetch {one.name}"].seconds == pytest.approx(180, rel=0.05)


def test_a_failure_is_told_with_its_reason(planned: Plan) -> None:
    step = next(s for s in planned.builds() if s.kind == "fetch")
    step.folder.mkdir(parents=True)
    write_json(step.folder / "failed.json", {"reason": "no [room] left"})
    job = states(planned)[f"fetch {step.name}"]
    assert (job.state, job.detail) == ("failed", "no [room] left")


def test_a_half_written_sign_and_names_with_brackets_do_no_harm(planned: Plan) -> None:
    (planned.home / "running").mkdir()
    (planned.home / "running" / "x.json").write_text('{"folder": "')
    from rich.console import Console

    console = Console(width=150)
    with console.capture() as captured:
        console.print(table(list(states(planned).values())))
    assert "train clm" in captured.get()


def test_a_failed_build_and_its_status_by_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.build import STAGES, build
    from harness.status import status

    def broken(*_: object) -> dict:
        from fusion.errors import RunError

        raise RunError("the disk is on fire")

    monkeypatch.setenv("KFUSE_HOME", str(tmp_path))
    monkeypatch.setitem(STAGES, "fetch", broken)
    build(plan(load("tiny").recipe, tmp_path), ["llama"])
    status("tiny", [], ["llama"], live=True)  # no terminal: once, and plain
    out = capsys.readouterr().out
    assert "failed" in out
    assert "the disk is on fire" in out
