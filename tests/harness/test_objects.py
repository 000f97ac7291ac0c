"""Locks in an object store, and what is said when the store is not as it should be."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fusion.errors import RunError
from harness import locks, mirror, objects
from harness.locks import owned
from harness.run import run
from harness.store import home

ROOT = Path(__file__).resolve().parent.parent.parent
HOLD = """
import sys, time
from harness.locks import owned
from harness.store import home
with owned(home(), "one"):
    print("held", flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "FAR", 0.01)


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of one kind or another, and this machine's mirror."""
    address = f"{request.param}://{tmp_path / 'store'}"
    monkeypatch.setenv("KFUSE_HOME", address)
    monkeypatch.setenv("KFUSE_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr(objects, "_exclusive", set())
    return address


def listed() -> set[str]:
    with objects.opened("listing") as (fs, root):
        return {path[len(root) + 1 :] for path in fs.find(root)}


def test_threads_hold_a_lock_one_after_the_other(store: str) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(5):
            with owned(home(), "one") as own:
                assert own
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert listed() == set()
    with owned(home(), "one"), owned(home(), "one", wait=False) as own:
        assert not own


def held(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    """Another machine's process, which holds the lock."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KFUSE_MIRROR": str(tmp_path / "other")}
    command = [sys.executable, "-c", HOLD, str(seconds)]
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_a_process_waits_for_another_s_and_not_for_a_dead_one_s(store: str, tmp_path: Path) -> None:
    with held(tmp_path, 1.0):
        started = time.monotonic()
        with owned(home(), "one"):
            assert time.monotonic() - started > 0.5
    with held(tmp_path, 600) as process:
        process.kill()
        process.wait()
        started = time.monotonic()
        with owned(home(), "one"):
            assert time.monotonic() - started < 10, "one of this machine: at once"
    assert listed() == set()


def test_an_owner_elsewhere_is_lost_when_it_gives_no_sign_of_life(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOST", 0.3)
    path = home() / "running" / "one.lock"
    sign = locks._sign() | {"host": "elsewhere"}
    assert objects.create(path, str(sign))
    until = time.monotonic() + 0.6

    def lives() -> None:
        while time.monotonic() < until:
            objects.renew(path, sign["token"])
            time.sleep(0.02)

    living = threading.Thread(target=lives)
    living.start()
    with owned(home(), "one"):
        assert time.monotonic() >= until, "it lived for as long"
        living.join()
        before = objects.look(path)
        objects.renew(path, sign["token"])  # wakes up: the lock is another's
        assert objects.look(path) == before
        locks._give_back(path, sign)
        assert objects.look(path) == before
    assert listed() == set()


def test_an_owner_renews_its_lock(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with owned(home(), "one"):
        path = home() / "running" / "one.lock"
        seen = set()
        while len(seen) < 3:
            seen.add(objects.look(path))
        assert len({said for said, _ in seen}) == 1, "the lock itself is never written again"
    assert listed() == set()


def test_only_what_was_seen_is_taken_away(store: str) -> None:
    path = home() / "running" / "one.lock"
    assert objects.create(path, "first")
    seen = objects.look(path)
    objects.renew(path, "first")
    objects.take_away(path, seen, 60.0)
    again = objects.look(path)
    assert objects.create(path.with_suffix(".free"), "another is removing it")
    objects.take_away(path, again, 60.0)
    assert objects.look(path) == again
    objects.take_away(path, again, -1.0)  # that one died at it
    objects.take_away(path, again, 60.0)
    assert listed() == set()


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFUSE_HOME", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("KFUSE_MIRROR", str(tmp_path / "mirror"))

    def down(*_: object) -> None:
        raise ConnectionError("network is unreachable")

    with monkeypatch.context() as patched:
        patched.setattr(objects, "put", down)
        assert run("tiny", only=["llama"], stages=("build",)) == 1
    assert "sending models/llama-" in capsys.readouterr().err
    assert not list((tmp_path / "store").glob("models/*/manifest.json"))
    before = [p.stat().st_mtime_ns for p in tmp_path.glob("mirror/models/*/model.safetensors")]
    assert run("tiny", only=["llama"], stages=("build",)) == 0
    assert [
        p.stat().st_mtime_ns for p in tmp_path.glob("mirror/models/*/model.safetensors")
    ] == before
    assert list((tmp_path / "store").glob("models/*/manifest.json"))
