"""What is said when an object store is not as it should be; its locks: `test_locks`."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fusion.errors import RunError
from harness import mirror, objects
from harness.locks import owned
from harness.run import run
from harness.store import home


class Careless(MemoryFileSystem):
    """A store that writes over what is there."""

    protocol = "careless"
    store: dict[str, Any] = {}

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return super().open(path, mode.replace("x", "w"), **kwargs)


class Failing(MemoryFileSystem):
    """A store with buckets that gives nothing."""

    protocol = "failing"
    error: Exception = OSError("down")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("failing://")

    def exists(self, path: str, **_: Any) -> bool:
        return False

    def find(self, *_: Any, **__: Any) -> Any:
        raise self.error


@pytest.fixture
def _kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFUSE_MIRROR", str(tmp_path / "mirror"))
    for kind in (Careless, Failing):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)


@pytest.mark.usefixtures("_kinds")
def test_a_store_that_does_not_create_exclusively_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KFUSE_HOME", "careless://bucket/store")
    with pytest.raises(RunError, match="does not create objects exclusively"), owned(home(), "one"):
        pass


@pytest.mark.usefixtures("_kinds")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError("Access Denied"),
            "Access Denied.*the right to read, write, list and dele",
        ),
        (FileNotFoundError("The specified bucket does not exist"), "is there such a bucket"),
        (TimeoutError("timed out"), r"TimeoutError: timed out.*run again to go on"),
        (type("EndpointConnectionError", (Exception,), {})("no route"), "is the network there"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left .*make room"),
    ],
)
def test_what_is_wrong_with_a_store_is_told_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    monkeypatch.setattr(Failing, "error", error)
    monkeypatch.setenv("KFUSE_HOME", "failing://bucket/store")
    with pytest.raises(RunError, match=said):
        mirror.learn(home())


@pytest.mark.usefixtures("_kinds")
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFUSE_HOME", "s3://bucket/store")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(RunError, match=r"KFUSE_HOME: s3://bucket/store: .*pip install s3fs"):
        mirror.learn(home())
    monkeypatch.setenv("KFUSE_HOME", "nothing://bucket/store")
    with pytest.raises(RunError, match="nothing.*s3://, gs:// and abfs:// are such"):
        mirror.learn(home())


def test_a_network_that_goes_leaves_what_is_done(
    store: Path,
    at: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = at("mirror")

    def down(*_: object) -> None:
        raise ConnectionError("network is unreachable")

    with monkeypatch.context() as patched:
        patched.setattr(objects, "put", down)
        assert run("tiny", only=["llama"], stages=("build",)) == 1
    assert "sending models/llama-" in capsys.readouterr().err
    assert not list(store.glob("models/*/manifest.json"))
    weights = "models/*/model.safetensors"
    before = [path.stat().st_mtime_ns for path in own.glob(weights)]
    assert run("tiny", only=["llama"], stages=("build",)) == 0
    assert [path.stat().st_mtime_ns for path in own.glob(weights)] == before
    assert list(store.glob("models/*/manifest.json"))
