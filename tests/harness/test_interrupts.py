"""Ctrl-C and kill -9 of a measurement in two processes: nothing is lost, none stays behind.

Two commands at once share the work.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.measuring import measure_rows
from harness.plan import Plan, Step, plan
from harness.recipe import load
from harness.samples import parts, spent
from harness.store import read_manifest

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 60  # seconds until those that were ended are gone


def planned(recipe: Path, home: Path) -> tuple[Plan, Step]:
    """In one process, which comes to the same bytes and starts sooner."""
    made = plan(load(str(recipe), ("machine.shards=1",)).recipe, home)
    return made, made.evaluations("model")[0]


def contents(step: Step) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in [*parts(step.folder), step.folder / "scores.parquet"]}


@pytest.fixture
def recipe(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """Texts for sixteen packs."""
    text = tmp_path / "own.jsonl"
    rows = [{"domain": "law", "text": f"{i} men went home"} for i in range(1000)]
    text.write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
sources: {{model: {{path: {tiny["llama"]}}}}}
corpus: {{path: "tiny:corpus", blocks: 64, tokens: 512, heldout: {text}}}
evaluate: {{suites: [bits_per_byte]}}
reference: model
machine: {{shards: 2, device: cpu}}
""")
    return path


def started(recipe: Path, home: Path) -> subprocess.Popen[str]:
    """The command, in a group of its own as a terminal gives it."""
    environment = os.environ | {"KFUSE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "harness.cli", "evaluate", str(recipe)]
    return subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_interrupted_and_killed_measurements_leave_whole_parts_and_go_on(
    recipe: Path, tmp_path: Path
) -> None:
    runs = {name: started(recipe, tmp_path / name) for name in ("interrupted", "killed")}
    steps = {name: planned(recipe, tmp_path / name) for name in runs}
    waiting, families = set(runs), {}
    while waiting:
        ready = [name for name in waiting if parts(steps[name][1].folder)]
        assert all(run.poll() is None for name, run in runs.items() if name in waiting)
        for name in ready:
            families[name] = psutil.Process(runs[name].pid).children(recursive=True)
            if name == "interrupted":
                os.killpg(runs[name].pid, signal.SIGINT)
            else:
                runs[name].kill()
            waiting.remove(name)
        time.sleep(0.005)
    whole, reference = planned(recipe, tmp_path / "whole")
    assert measure_rows(whole, {"model": [reference]}) == {}
    assert len(parts(reference.folder)) == 16
    for name, run in runs.items():
        _, said = run.communicate(timeout=PATIENCE)
        assert run.returncode == (130 if name == "interrupted" else -signal.SIGKILL), said
        assert "Traceback" not in said
        assert len(families[name]) >= 3, "a server and two processes that measure"
        _, alive = psutil.wait_procs(families[name], timeout=PATIENCE)
        assert not alive
        made, step = steps[name]
        assert read_manifest(step.folder) is None, "it ended before it was done"
        before = {p: p.stat().st_mtime_ns for p in parts(step.folder)}
        assert 1 <= len(before) < 16
        assert measure_rows(made, {"model": [step]}) == {}
        assert all(path.stat().st_mtime_ns == then for path, then in before.items())
        assert contents(step) == contents(reference)
        assert not list(step.folder.glob(".samples*"))


def test_two_commands_at_once_measure_nothing_twice(recipe: Path, tmp_path: Path) -> None:
    runs = [started(recipe, tmp_path / "home") for _ in range(2)]
    for run in runs:
        _, said = run.communicate(timeout=2 * PATIENCE)
        assert run.returncode == 0, said
    _, step = planned(recipe, tmp_path / "home")
    assert step.done
    assert sorted(entry["pack"] for entry in spent(step.folder)) == list(range(16))
    assert not list((tmp_path / "home" / "running").iterdir())
