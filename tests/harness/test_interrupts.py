"""Ctrl-C and kill -9 of a measurement in two processes: nothing is lost, none stays behind.

Two commands at once share the work.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.measuring import measure_rows
from harness.plan import Plan, Step, plan
from harness.recipe import load
from harness.samples import parts, spent
from harness.store import read_manifest
from tests.warm import Warm, command

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


def evaluated(recipe: Path, home: Path) -> dict[str, Any]:
    """The job of the command, which gets a group of its own as a terminal gives it."""
    return command(home.with_suffix(".said"), "evaluate", str(recipe), KFUSE_HOME=str(home))


def test_interrupted_and_killed_measurements_leave_whole_parts_and_go_on(
    warm: Warm, recipe: Path, tmp_path: Path
) -> None:
    names = ("interrupted", "killed")
    numbers = warm.start([evaluated(recipe, tmp_path / name) for name in names])
    runs = {name: psutil.Process(number) for name, number in zip(names, numbers, strict=True)}
    steps = {name: planned(recipe, tmp_path / name) for name in runs}
    waiting, families = set(runs), {}
    while waiting:
        ready = [name for name in waiting if parts(steps[name][1].folder)]
        assert all(runs[name].status() != psutil.STATUS_ZOMBIE for name in waiting)
        for name in ready:
            families[name] = runs[name].children(recursive=True)
            if name == "interrupted":
                os.killpg(runs[name].pid, signal.SIGINT)
            else:
                runs[name].kill()
            waiting.remove(name)
        time.sleep(0.005)
    whole, reference = planned(recipe, tmp_path / "whole")
    assert measure_rows(whole, {"model": [reference]}) == {}
    assert len(parts(reference.folder)) == 16
    codes = dict(zip(names, warm.wait(), strict=True))
    for name in names:
        said = (tmp_path / f"{name}.said").read_text()
        assert codes[name] == (130 if name == "interrupted" else -signal.SIGKILL), said
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


def test_two_commands_at_once_measure_nothing_twice(
    warm: Warm, recipe: Path, tmp_path: Path
) -> None:
    warm.start([evaluated(recipe, tmp_path / "home")] * 2)
    assert warm.wait() == [0, 0], (tmp_path / "home.said").read_text()
    _, step = planned(recipe, tmp_path / "home")
    assert step.done
    assert sorted(entry["pack"] for entry in spent(step.folder)) == list(range(16))
    assert not list((tmp_path / "home" / "running").iterdir())
