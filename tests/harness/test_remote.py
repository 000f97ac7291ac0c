"""A recipe on a cluster of this machine: the bytes of a local run, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fusion.errors import RecipeError, RunError
from harness import build, remote, worker
from harness.run import run
from harness.store import read_manifest
from tests.warm import ROOT, Warm, command

PATIENCE = 120  # seconds until what is waited for has come
# What tells when, where or by which commit something was made, and what it took.
OCCASION = ("manifest.json", "ledger.jsonl", "job.json", "training.csv", "hashes.json")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head without processors and two nodes with one each, as three machines would be."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        patch.setenv("PYTHONPATH", path)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's workers give way to whatever else runs, which beside other tests is for minutes.
        patch.setenv("RAY_worker_niceness", "0")
        head = {"num_cpus": 0, "include_dashboard": False, **small}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.two = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, a fused row and a merge; five packs of texts."""
    folder = tmp_path_factory.mktemp("recipe")
    text = folder / "own.jsonl"
    rows = [{"domain": "law", "text": f"{i} men {'walk ' * (i % 9)}home"} for i in range(260)]
    text.write_text("\n".join(map(json.dumps, rows)))
    path = folder / "small.yaml"
    path.write_text(f"""
sources: {{llama: {{path: "tiny:llama"}}, gemma: {{path: "tiny:gemma"}}}}
corpus: {{path: "tiny:corpus", blocks: 64, tokens: 2048, heldout: {text}}}
variants:
  fused:
    train:
      init: llama
      batch_blocks: 4
      fuse: {{sources: [llama, gemma], function: min_ce, clm_weight: 0.9}}
  merged: {{merge: {{inputs: [llama, fused], method: linear}}}}
evaluate: {{suites: [bits_per_byte]}}
reference: llama
machine: {{device: cpu}}
""")
    return path


@pytest.fixture(scope="module")
def local(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run on this machine alone leaves."""
    home = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KFUSE_HOME", str(home))
        assert run(str(recipe)) == 0
    return contents(home)


def contents(home: Path) -> dict[str, bytes]:
    """Files by path; of manifests what they say of the result."""
    rooms = ("distributions", "models", "evaluations")
    found = [p for room in rooms for p in (home / room).rglob("*") if p.is_file()]
    out = {str(p.relative_to(home)): p.read_bytes() for p in found if p.name not in OCCASION}
    for path in found:
        if path.name == "manifest.json":
            manifest = read_manifest(path.parent) or {}
            kept = {k: v for k, v in manifest.items() if k not in ("cost", "created")}
            out[str(path.relative_to(home))] = json.dumps(kept, sort_keys=True).encode()
    return out


def finished(home: Path) -> dict[Path, int]:
    """When each file of folders that count was written."""
    folders = [path.parent for path in home.glob("*/*/manifest.json")]
    return {p: p.stat().st_mtime_ns for folder in folders for p in folder.iterdir()}


def until(found: Callable[[], Any], process: int) -> Any:
    """What is found at last, while a command runs."""
    deadline = time.monotonic() + PATIENCE
    while not (it := found()):
        assert time.monotonic() < deadline, "nothing came"
        assert psutil.Process(process).status() != psutil.STATUS_ZOMBIE, "the command has ended"
        time.sleep(0.02)
    return it


def training(home: Path) -> set[int]:
    """The processes that train the fused row, as their signs say; one may be dead."""
    out = set()
    for path in (home / "running").glob("fused-????????.*.json"):
        with suppress(OSError, ValueError):
            out.add(int(json.loads(path.read_text())["pid"]))
    return out


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def job(recipe: Path, home: Path, address: str) -> dict[str, Any]:
    """The command; what it says is shown by the test if it fails."""
    line = ["run", str(recipe), "--executor", "ray", "--address", address]
    return command(home / "said", *line, KFUSE_HOME=str(home))


def test_killed_workers_commands_and_nodes_change_no_byte(
    warm: Warm, nodes: Any, recipe: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    (first,) = warm.start([job(recipe, tmp_path, nodes.address)])
    until(lambda: list(tmp_path.glob("distributions/capture-*/manifest.json")), first)
    os.kill(first, signal.SIGKILL)
    assert warm.wait() == [-signal.SIGKILL]
    (tmp_path / "said").unlink()
    before = finished(tmp_path)
    assert not list(tmp_path.glob("models/merged-*/manifest.json")), "it ended before it was done"

    (second,) = warm.start([job(recipe, tmp_path, nodes.address)])
    (killed,) = until(lambda: training(tmp_path), second)
    os.kill(killed, signal.SIGKILL)
    (other,) = until(lambda: training(tmp_path) - {killed}, second)
    raylet = psutil.Process(other).ppid()
    (lost,) = (node for node in nodes.two if raylet_of(node) == raylet)
    nodes.remove_node(lost, allow_graceful=False)
    codes = warm.wait()
    said = (tmp_path / "said").read_text()
    assert codes == [0], said
    assert said.count("train fused: its worker was lost") == 2
    assert "share 2 of 2" in said
    after = finished(tmp_path)
    assert {path: after[path] for path in before} == before
    assert contents(tmp_path) == local
    for folder in tmp_path.glob("distributions/capture-*"):
        cost = (read_manifest(folder) or {})["cost"]
        assert cost["seconds"] > 0
        assert cost["flops"] > 0
    assert not list((tmp_path / "running").glob("*.lock"))


class Here:
    """Ray's few calls that are used, each task done at once in this process."""

    def __init__(self, cpus: float = 2.0, gpus: float = 0.0, lose: int = 0) -> None:
        room = {"CPU": cpus, "GPU": gpus, "memory": 2.0**34}
        self.node, self.lose = {"Alive": True, "Resources": room}, lose
        self.given: list[tuple[str, dict[str, Any]]] = []
        self.results: dict[int, Any] = {}

    def nodes(self) -> list[dict[str, Any]]:
        return [self.node]

    def put(self, plan: Any) -> Any:
        return plan

    def remote(self, work: Callable[..., Any]) -> Any:
        def options(**said: Any) -> Any:
            def give(*given: Any) -> int:
                self.given.append((said["name"], said))
                number = len(self.given)
                if self.lose:
                    self.lose -= 1
                    from ray.exceptions import WorkerCrashedError

                    self.results[number] = WorkerCrashedError()
                else:
                    self.results[number] = work(*given)
                return number

            return SimpleNamespace(remote=give)

        return SimpleNamespace(options=options)

    def wait(self, references: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return references[:1], references[1:]

    def get(self, reference: int) -> Any:
        if isinstance(self.results[reference], Exception):
            raise self.results[reference]
        return self.results[reference]

    def cancel(self, reference: int, force: bool) -> None:
        assert force


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Here]:
    """Let commands use such a cluster instead of a real one."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")

    def use(**facts: Any) -> Here:
        ray = Here(**facts)
        monkeypatch.setattr(remote, "cluster", lambda _: nullcontext(ray))
        return ray

    return use


def test_shares_come_to_the_bytes_of_one_process(
    here: Callable[..., Here], recipe: Path, local: dict[str, bytes], home: Path
) -> None:
    ray = here()
    assert run(str(recipe), executor="ray") == 0
    assert contents(home) == local
    names = [name for name, _ in ray.given]
    assert "capture gemma, share 2 of 2" in names
    assert "evaluate merged · bits_per_byte, share 2 of 2" in names
    first = [name for name in names if not name.startswith("questions")]
    assert first.index("train fused") < first.index("evaluate llama · bits_per_byte, share 1 of 2")
    assert {said["max_retries"] for _, said in ray.given} == {0}
    before = len(ray.given)
    assert run(str(recipe), executor="ray") == 0
    assert len(ray.given) == before, "nothing is left to be done"


def test_what_cannot_be_made_is_told_as_a_local_run_tells_it(
    here: Callable[..., Here],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object) -> dict:
        raise RunError("the disk is on fire")

    monkeypatch.setitem(build.STAGES, "train", broken)
    told = {}
    for executor in ("local", "ray"):
        here()
        monkeypatch.setenv("KFUSE_HOME", str(tmp_path / executor))
        assert run(str(recipe), stages=("build", "evaluate"), executor=executor) == 1
        lines = capsys.readouterr().err.splitlines()
        told[executor] = {line for line in lines if line.startswith(("fused", "merged"))}
        left = (tmp_path / executor).glob("*/*/failed.json")
        told[executor] |= {f"{p.parent.name} {p.read_text()}" for p in left}
        assert len(list((tmp_path / executor).glob("evaluations/*/manifest.json"))) == 2
    assert told["ray"] == told["local"]
    assert "fused: train fused failed: the disk is on fire" in told["ray"]
    for executor in ("local", "ray"):
        monkeypatch.setenv("KFUSE_HOME", str(tmp_path / executor))
        assert run(str(recipe), stages=("evaluate",), executor=executor) == 1
        told[executor] = set(capsys.readouterr().err.splitlines())
    line = "merged/bits_per_byte: not measured: not built: merged"
    assert line in told["local"] & told["ray"]


def test_a_lost_worker_is_replaced_but_not_for_ever(
    here: Callable[..., Here], recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here(lose=remote.TRIES - 1)
    assert run(str(recipe), only=["llama"], stages=("build",), executor="ray") == 0
    assert capsys.readouterr().err.count("its worker was lost") == remote.TRIES - 1
    here(lose=remote.TRIES)
    assert run(str(recipe), only=["gemma"], stages=("build",), executor="ray") == 1
    assert f"gemma: fetch gemma failed: its worker was lost {remote.TRIES} times" in (
        capsys.readouterr().err
    )


def test_a_node_that_is_not_like_this_machine_ends_the_run(
    here: Callable[..., Here], recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here()
    own = worker.Setting.here
    monkeypatch.setattr(
        worker.Setting,
        "here",
        lambda sign: replace(own(sign), made_by={"packages": {"torch": "0.1"}, "commit": "a"}),
    )
    with pytest.raises(RunError, match=r"torch .* in place of 0\.1"):
        run(str(recipe), executor="ray")
    monkeypatch.setattr(worker.Setting, "here", lambda sign: own(sign.with_name("nowhere")))
    with pytest.raises(RunError, match="does not see the store"):
        run(str(recipe), executor="ray")
    assert not list(home.glob("*/*/manifest.json"))


def test_gpus_are_asked_for_and_must_be_there(
    here: Callable[..., Here], recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here()
    with pytest.raises(RunError, match="no node has a GPU"):
        run(str(recipe), ["machine.device=cuda"], executor="ray")
    with pytest.raises(RecipeError, match="a GPU of one machine"):
        run(str(recipe), ["machine.device=cuda:1"], executor="ray")
    here(gpus=1.0)
    given = ["machine.device=cuda", "machine.processes=4", "evaluate.suites=[tiny_text]"]
    assert run(str(recipe), given, ["fused"], ("build",), executor="ray") == 1
    assert "needs 4 GPUs" in capsys.readouterr().err


def test_an_address_where_nothing_answers_is_told_at_once(recipe: Path, home: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with pytest.raises(RunError, match=r"--address 127\.0\.0\.1:1: no Ray cluster answers"):
        run(str(recipe), executor="ray", address="127.0.0.1:1")
    assert not list(home.glob("*/*"))


def test_a_cluster_that_refuses_this_machine_is_told_with_the_token_it_may_want(
    recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(remote, "_reach", lambda address: None)
    for error in (
        ray.exceptions.AuthenticationError("no token"),
        RuntimeError("Failed to connect"),
    ):

        def refuses(error: Exception = error, **_: Any) -> None:
            raise error

        monkeypatch.setattr(ray, "init", refuses)
        with pytest.raises(RunError, match=r"did not get into a Ray cluster .*\.ray/auth_token"):
            run(str(recipe), executor="ray", address="127.0.0.1:6379")
        with pytest.raises(RunError, match="Ray does not start on this machine"):
            run(str(recipe), executor="ray")
    assert not list(home.glob("*/*"))


def test_what_is_no_executor_is_said_before_any_work(
    recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="--executor slurm: unknown; local"):
        run(str(recipe), executor="slurm")
    with pytest.raises(RecipeError, match="belongs to --executor ray"):
        run(str(recipe), address="127.0.0.1:1")
    monkeypatch.setattr(remote, "find_spec", lambda _: None)
    with pytest.raises(RunError, match=r"pip install 'kfuse\[ray\]'"):
        run(str(recipe), executor="ray", dry_run=True)
    assert not home.exists()
