"""No network in any test, and a store of its own for each."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from tests.warm import Warm

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Files run side by side; threads of their own would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A first call imports a library; how long that takes says nothing.
settings.register_profile("kfuse", deadline=None)
settings.load_profile("kfuse")

ROOT = Path(__file__).resolve().parent.parent


# These take longest, in this order; begun last, they would run alone.
LONG = (
    "test_pipeline.py",
    "test_remote.py",
    "test_languages.py",
    "test_training.py",
    "test_hosts.py",
    "test_page.py",
    "test_loops.py",
    "test_interrupts.py",
    "test_lora.py",
    "test_restart.py",
    "test_shards.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    """Leave what the libraries made out of collections of garbage, each of which visits all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        local = self.family == socket.AF_UNIX or (
            isinstance(address, tuple) and str(address[0]) in ("127.0.0.1", "::1", "localhost")
        )
        if not local:
            raise OSError(f"tests have no network, but {address} was asked for")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store."""
    monkeypatch.setenv("KFUSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded outputs and data beside the repository, or a skip."""
    path = ROOT.parent / "shared"
    if not (path / "golden").is_dir():
        pytest.skip("no folder `shared` with recorded outputs beside the repository")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three tiny model folders by name."""
    from harness.tiny import make_model

    root = tmp_path_factory.mktemp("tiny")
    for name in ("llama", "gemma", "neox"):
        make_model(name, root / name)
    return {name: root / name for name in ("llama", "gemma", "neox")}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `kfuse run tiny` left in an empty store, `home`, and said: run once."""
    from tests.test_pipeline import here

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # above what each of its processes has for itself
        folder = folder.parent
    folder /= "tiny-run"
    with FileLock(f"{folder}.lock"):
        if not (folder / "said").exists():
            folder.mkdir(exist_ok=True)
            done = here("run", "tiny", home=folder / "home")
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "said").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A server of processes that need not read the libraries of training and measuring."""
    modules = ("harness.build", "harness.measuring", "harness.report", "reports.report")
    server = Warm("harness.cli", *modules, "fusion.training", "deepspeed")
    yield server
    server.close()
