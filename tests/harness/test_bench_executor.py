"""The simulated sweep: what manifests recorded, shared out and put in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.bench_executor import curve, opened
from harness.jobs import Machines
from harness.plan import plan
from harness.recipe import load
from harness.run import asked
from harness.store import finish


def test_recorded_seconds_come_to_a_makespan_for_each_number_of_workers(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load("tiny")
    planned = plan(loaded.recipe, home)
    steps = asked(planned, loaded)
    seconds = {"capture": 40.0, "train": 100.0}
    for step in steps:
        step.folder.mkdir(parents=True)
        finish(step.folder, {"cost": {"seconds": seconds.get(step.kind, 1.0)}})
    costs = opened("tiny", recorded=True)
    total = sum(seconds.get(step.kind, 1.0) for step in steps)
    for workers in (1, 4):
        jobs = costs.jobs(Machines(workers, gpu=False))
        assert sum(job.seconds for job in jobs.values()) == pytest.approx(total)
    curve(costs, gpu=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"  1 workers: {total:.1f} s, busy 100.0%")
    # Fetch, pack, a quarter of a capture, train, merge and the measurement of what was merged.
    assert lines[-1].startswith("critical path 114.0 s of ")
    assert " 64 workers: 114.0 s, " in lines[-2]
