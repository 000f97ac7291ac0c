"""Hosts that train together, as two on this machine: what is said, who comes, what comes out."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fusion import ending
from fusion.errors import RecipeError, RunError
from harness import hosts, launching
from harness.hosts import calling, join
from harness.launching import help_out, launch
from harness.plan import plan
from harness.progress import saying
from harness.recipe import load
from harness.run import run
from harness.store import provenance, read_manifest

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


@pytest.mark.timeout(300)  # two agents
def test_the_host_that_calls_has_the_first_ranks_whoever_comes_first(tmp_path: Path) -> None:
    port = launching._free_port()
    call = {"id": "its", "endpoint": f"127.0.0.1:{port}", "hosts": 2}
    script = tmp_path / "rank.py"
    script.write_text("import os, sys; open(sys.argv[1], 'w').write(os.environ['RANK'])")
    agents = []
    for name in ("joins", "calls"):  # the one with the lower process number does not matter, too
        options = launching._meeting(call, first=name == "calls")
        command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc_per_node", "1"]
        agents.append(subprocess.Popen([*command, str(script), str(tmp_path / name)]))
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0]
    assert (tmp_path / "calls").read_text() == "0"
    assert (tmp_path / "joins").read_text() == "1"


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
    found = hosts._sign(home, "my[1]")
    assert found
    assert found | sign == found


def test_of_two_hosts_that_run_the_one_that_trains_is_joined_through_looks_that_miss_it(
    recipe: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "GLANCE", 0.0)
    folder = home / "running"
    folder.mkdir(parents=True)
    common = {"folder": "hosts-two", "host": "elsewhere", "pid": 1, "made_by": provenance()}
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


def signs(monkeypatch: pytest.MonkeyPatch, *found: object) -> None:
    """What a host that joins sees at one look after another, and nothing from then on."""
    asked = iter(found)
    monkeypatch.setattr(hosts, "GLANCE", 0.0)
    monkeypatch.setattr(hosts, "_sign", lambda *_: next(asked, None))


def trained(monkeypatch: pytest.MonkeyPatch, *left: list[str]) -> None:
    """What is left to be trained at one look after another; the last of these from then on."""
    asked = iter(left)
    monkeypatch.setattr(hosts, "_left", lambda *_: next(asked, left[-1]))


def call(name: str) -> dict[str, object]:
    return {"made_by": provenance(), "training": {"id": name, "job": f"/{name}/job.json"}}


@pytest.mark.parametrize(
    ("fails", "left", "code"),
    [
        ("first", [], 0),  # what failed once was trained in the end
        ("first", ["clm"], 1),
        ("", ["other"], 0),  # a row that was not asked for
        ("second", ["clm"], 1),
    ],
)
def test_a_host_that_joined_ends_as_the_training_did(
    recipe: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: str,
    left: list[str],
    code: int,
) -> None:
    def helps(call: dict[str, str]) -> None:
        call["endpoint"] = "b:1"
        if call["id"] == fails:
            raise RunError("lost")

    made = [call("first"), call("second")]
    if fails == "first" and left:
        made.pop()
    for one in made:
        one["training"]["endpoint"] = "b:1"  # type: ignore[index]
    signs(monkeypatch, *made)
    trained(monkeypatch, left)
    monkeypatch.setattr(hosts, "help_out", helps)
    assert join(recipe) == code
    said = capsys.readouterr().err
    assert ("all is trained" in said) is not left
    assert all(name in said for name in left)


def test_a_host_that_meets_nobody_ends_by_itself(
    recipe: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    signs(monkeypatch)
    monkeypatch.setattr(hosts, "LOOK", 3)
    trained(monkeypatch, ["clm"], [])  # the run began and ended between two looks
    assert join(recipe) == 0
    assert "all is trained" in capsys.readouterr().err
    monkeypatch.setattr(hosts, "PATIENCE", 0.1)
    trained(monkeypatch, ["clm"])
    assert join(recipe) == 1
    assert "nobody has run it" in capsys.readouterr().err


def test_a_host_with_other_versions_is_refused(
    recipe: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = provenance()["packages"] | {"torch": "0.1"}
    signs(monkeypatch, call("its") | {"made_by": provenance() | {"packages": packages}})
    with pytest.raises(RunError, match=r"has torch .* in place of 0\.1; install the same versions"):
        join(recipe)


def test_a_training_is_called_for_exactly_as_long_as_it_lasts(recipe: str, home: Path) -> None:
    loaded = load(recipe)
    with calling(plan(loaded.recipe, home), loaded.name):
        for _ in range(3):
            with saying(training={"id": "its"}):
                assert (hosts._sign(home, "two") or {})["training"]["id"] == "its"
            assert "training" not in (hosts._sign(home, "two") or {})


def test_a_host_that_gives_no_sign_ends_what_it_had_a_part_in(home: Path) -> None:
    folder = home / "running"
    folder.mkdir(parents=True)
    sign = {"folder": "joined-its", "host": "b", "pid": 7, "training": {"id": "its"}}
    path = folder / "joined-its.b.7.json"
    path.write_text(json.dumps(sign))
    launching._require_others({"id": "its"})
    os.utime(path, (time.time() - 70, time.time() - 70))
    launching._require_others({"id": "another"})
    with pytest.raises(RunError, match=r"b \(process 7\).* gives no sign of life since 70 s"):
        launching._require_others({"id": "its"})


def test_a_training_that_leaves_no_weights_is_no_training(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "SEEN", 0.0)
    monkeypatch.setattr(launching.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(launching, "_torchrun", lambda *_: None)
    home.mkdir()
    for hosts_ in (1, 2):
        with pytest.raises(RunError, match=r"config\.json, model\.safetensors, .* is not there"):
            launch(home / "job.json", 1, hosts_)
    files = ("config.json", "tokenizer_config.json", "training.csv")
    for name in (*files, "model-00002-of-00002.safetensors"):
        (home / name).touch()
    index = {"weight_map": {n: f"model-0000{n}-of-00002.safetensors" for n in "12"}}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RunError, match="model-00001-of-00002.safetensors is not there"):
        launch(home / "job.json", 1)
    (home / "model-00001-of-00002.safetensors").touch()
    launch(home / "job.json", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends processes with their parents")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", ["command", "torchrun"])
def test_training_processes_end_with_what_started_them(tmp_path: Path, killed: str) -> None:
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
    if killed == "command":
        run.kill()
    else:
        family[0].kill()  # before the other has read what it needs to ask Linux
    run.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    for process in alive:
        process.kill()
    assert not alive


def test_a_training_process_whose_torchrun_has_gone_before_it_looked_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ending, "end_with_parent", lambda number: None)  # of the tests themselves
    above = psutil.Process(os.getppid()).ppid()
    for starter in (None, above):
        if starter is not None:
            monkeypatch.setenv(ending.STARTER, str(starter))
        ending.end_with_torchrun()
    monkeypatch.setenv(ending.STARTER, str(os.getppid()))
    with pytest.raises(SystemExit, match="has gone"):
        ending.end_with_torchrun()


def test_hosts_that_train_together_need_a_folder(store: Path, at: Callable[[str], Path]) -> None:
    at("first")
    with pytest.raises(RecipeError, match=r"machine\.hosts: is 2, .* KFUSE_HOME is file://"):
        run("tiny", ["machine.hosts=2"])
    with pytest.raises(RecipeError, match=r"machine\.hosts: is 2"):
        join("tiny", ["machine.hosts=2"])
