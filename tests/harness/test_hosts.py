"""Hosts that train together, as two on this machine: what is said, who comes, what comes out."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fusion.errors import RecipeError, RunError
from harness import hosts, launching
from harness.hosts import calling, join
from harness.launching import help_out, launch
from harness.plan import plan
from harness.recipe import load
from harness.run import run
from harness.store import read_manifest

TEXT = """
sources: {llama: {path: "tiny:llama"}}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 1280}
variants: {clm: {train: {init: llama, batch_blocks: 4, learning_rate: 0.003}}}
evaluate: {suites: [tiny_choice]}
reference: clm
machine: {device: cpu, hosts: 2, checkpoint_every: 3}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    path = tmp_path / "two.yaml"
    path.write_text(TEXT)
    return str(path)


def losses(home: Path) -> list[float]:
    (log,) = home.glob("models/clm-*/training.csv")
    with log.open(newline="") as lines:
        return [float(row["loss"]) for row in csv.DictReader(lines)]


@pytest.mark.timeout(600)  # two agents and two processes, each of which imports torch
def test_two_hosts_train_what_one_process_trains(
    recipe: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    other = threading.Thread(target=lambda: codes.append(join(recipe)), daemon=True)
    other.start()
    assert run(recipe, stages=("build",)) == 0
    other.join(timeout=60)
    assert codes == [0]
    (folder,) = home.glob("models/clm-*")
    assert (read_manifest(folder) or {})["facts"]["hosts"] == 2
    assert len(list(folder.glob("training.*.log"))) == 1  # of the host that joined
    assert join(recipe) == 0  # all is trained: it does not wait
    monkeypatch.setenv("KFUSE_HOME", str(tmp_path / "alone"))
    assert run(recipe, ["machine.hosts=1"], stages=("build",)) == 0
    assert (tmp_path / "alone" / "models" / folder.name).is_dir()  # the same row
    assert losses(home) == pytest.approx(losses(tmp_path / "alone"), rel=2e-6)
    assert len(losses(home)) == 5


def test_hosts_that_do_not_come_are_named(
    recipe: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.launching.PATIENCE", 1)
    (home / "models").mkdir(parents=True)
    with pytest.raises(RunError, match="not all hosts came .* say `kfuse join`"):
        launch(home / "models" / "job.json", 1, hosts=2)


def test_a_host_that_runs_says_so_for_as_long_as_it_builds(recipe: str, home: Path) -> None:
    loaded = load(recipe)
    planned = plan(loaded.recipe, home)
    with calling(planned, loaded.name):
        while not (signs := list(home.glob("running/hosts-two.*.json"))):  # a thread writes it
            time.sleep(0.01)
        (sign,) = signs
        assert json.loads(sign.read_text())["folder"] == "hosts-two"
    assert not list((home / "running").iterdir())
    with calling(plan(load(recipe, ["machine.hosts=1"]).recipe, home), loaded.name):
        assert not list((home / "running").iterdir())


def test_nobody_joins_a_recipe_of_one_host(recipe: str, home: Path) -> None:
    with pytest.raises(RecipeError, match=r"machine.hosts is 1.*say `machine.hosts=2`"):
        join(recipe, ["machine.hosts=1"])


def test_what_a_host_does_not_see_is_named_before_it_joins(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "SEEN", 0.0)
    monkeypatch.setattr(launching.time, "sleep", lambda seconds: None)
    home.mkdir()
    job = home / "job.json"
    call = {"job": str(job)}
    with pytest.raises(RunError, match="job.json: cannot be read here"):
        help_out(call)
    job.write_text(json.dumps({"init": "/nowhere/llama", "corpus": str(job), "sources": []}))
    with pytest.raises(RunError, match="/nowhere/llama is not on this host"):
        help_out(call)


def test_what_a_host_sees_a_little_later_is_waited_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir()
    job = home / "job.json"
    text = json.dumps({"init": str(home), "corpus": str(home), "sources": []})
    monkeypatch.setattr(launching.time, "sleep", lambda seconds: job.write_text(text))
    started: list[Path] = []
    monkeypatch.setattr(launching, "_torchrun", lambda job, *_: started.append(job))
    call = {"id": "its", "job": str(job), "endpoint": "b:1", "hosts": 2, "processes": 1}
    help_out(call)
    assert started == [job]


def test_a_recipe_s_name_is_no_pattern(home: Path) -> None:
    (home / "running").mkdir(parents=True)
    sign = {"folder": "hosts-my[1]", "host": "elsewhere", "pid": 1, "seen": time.time()}
    (home / "running" / "hosts-my[1].elsewhere.1.json").write_text(json.dumps(sign))
    assert hosts._sign(home, "my[1]") == sign


def test_of_two_hosts_that_run_the_one_that_trains_is_joined_through_looks_that_miss_it(
    recipe: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "GLANCE", 0.0)
    folder = home / "running"
    folder.mkdir(parents=True)
    common = {"folder": "hosts-two", "host": "elsewhere", "pid": 1, "seen": time.time()}
    waits, trains = folder / "hosts-two.a.1.json", folder / "hosts-two.b.1.json"
    waits.write_text(json.dumps(common))
    call = {"id": "its", "job": str(home / "models" / "clm" / "job.json"), "endpoint": "b:1"}
    helped: list[object] = []
    seen = hosts._sign(home, "two")
    trains.write_text(json.dumps(common | {"training": call}))
    asked = iter([seen, None, None, hosts._sign(home, "two")])
    monkeypatch.setattr(hosts, "_sign", lambda *_: next(asked, None))
    monkeypatch.setattr(hosts, "help_out", helped.append)
    assert join(recipe) == 0
    assert helped == [call]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends processes with their parents")
@pytest.mark.timeout(300)
def test_training_processes_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    os.mkfifo(job)  # which its reader waits at
    code = (
        "import sys; from pathlib import Path; from harness.launching import launch; "
        "launch(Path(sys.argv[1]), 1)"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(job)])
    family: list[psutil.Process] = []
    deadline = time.monotonic() + 200
    while len(family) < 2 or "fusion.training" not in family[-1].cmdline():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
        family = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    for process in alive:
        process.kill()
    assert not alive
