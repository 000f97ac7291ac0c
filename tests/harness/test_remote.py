"""A recipe on a cluster of this machine: the bytes of a local run, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.run import run
from harness.store import read_manifest

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 100  # seconds until what is waited for has come
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
  fused: {{train: {{init: llama, batch_blocks: 4, fuse: {{sources: [llama, gemma]}}}}}}
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


def until(found: Callable[[], Any]) -> Any:
    """What is found at last."""
    deadline = time.monotonic() + PATIENCE
    while not (it := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return it


def working_on(home: Path, beginning: str) -> list[int]:
    """The processes that work on folders whose names begin so."""
    out = []
    for path in (home / "running").glob(f"{beginning}*.json"):
        try:
            out.append(int(json.loads(path.read_text())["pid"]))
        except (OSError, ValueError):
            continue
    return out


def command(recipe: Path, home: Path, address: str) -> subprocess.Popen[str]:
    environment = os.environ | {"KFUSE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "harness.cli", "run", str(recipe), "--executor", "ray"]
    return subprocess.Popen(
        [*line, "--address", address], env=environment, stderr=subprocess.PIPE, text=True
    )


def test_killed_workers_commands_and_nodes_change_no_byte(
    nodes: Any, recipe: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    first = command(recipe, tmp_path, nodes.address)
    until(lambda: list(tmp_path.glob("distributions/capture-*/manifest.json")))
    first.kill()
    first.communicate()
    before = finished(tmp_path)
    assert not list(tmp_path.glob("models/merged-*/manifest.json")), "it ended before it was done"

    second = command(recipe, tmp_path, nodes.address)
    os.kill(until(lambda: working_on(tmp_path, "fused"))[0], signal.SIGKILL)
    until(lambda: list(tmp_path.glob("models/fused-*/manifest.json")))
    until(lambda: working_on(tmp_path, "llama-bits") or working_on(tmp_path, "fused-bits"))
    nodes.remove_node(nodes.two.pop(), allow_graceful=False)
    _, said = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, said
    assert "train fused: its worker was lost" in said
    assert "share 2 of 2" in said
    after = finished(tmp_path)
    assert {path: after[path] for path in before} == before
    assert contents(tmp_path) == local
    for folder in tmp_path.glob("distributions/capture-*"):
        cost = (read_manifest(folder) or {})["cost"]
        assert cost["seconds"] > 0
        assert cost["flops"] > 0
    assert not list((tmp_path / "running").glob("*.lock"))
