"""Locks of a store, a folder or an object store: one owner at a time, none that outlives it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fusion.errors import RunError
from harness import locks, objects
from harness.locks import Lost, owned, require
from harness.store import home, url

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
    monkeypatch.setattr(locks, "LOOK", 0.01)
    monkeypatch.setattr(locks, "FAR", 0.01)


@pytest.fixture(params=["folder", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of one kind or another: its folder, or this machine's mirror of the objects."""
    kind, folder = request.param, tmp_path / "store"
    monkeypatch.setenv("KFUSE_HOME", str(folder) if kind == "folder" else f"{kind}://{folder}")
    monkeypatch.setenv("KFUSE_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr(objects, "_exclusive", set())
    return home()


def put(path: Path, text: str) -> None:
    """Write a file or an object, whatever is there."""
    if objects.name_of(path):
        objects.write(path, text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def leave(store: Path, **facts: object) -> Path:
    """A lock that somebody left."""
    path = store / "running" / "one.lock"
    put(path, json.dumps(locks._sign() | facts))
    return path


def renew(path: Path, token: str) -> None:
    """Give a sign of life of a lock's owner, as a time that is not rounded to the kernel's."""
    if objects.name_of(path):
        objects.renew(path, token)
    else:
        os.utime(path, ns=(time.time_ns(),) * 2)


def left(store: Path) -> set[str]:
    """All that is in the store."""
    if not url():
        return {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}
    with objects.opened("listing") as (fs, root):
        return {path[len(root) + 1 :] for path in fs.find(root)}


def test_threads_hold_a_lock_one_after_the_other(store: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(10):
            with owned(store, "one") as own:
                assert own
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert left(store) == set()


def test_who_does_not_wait_is_told(store: Path) -> None:
    with owned(store, "one"), owned(store, "one", wait=False) as own:
        assert not own
    with owned(store, "one", wait=False) as own:
        assert own


def held(seconds: float, mirror: Path) -> subprocess.Popen[str]:
    """Another process, as on another machine with a mirror of its own, which holds the lock."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KFUSE_MIRROR": str(mirror)}
    command = [sys.executable, "-c", HOLD, str(seconds)]
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("store", ["folder", "file"], indirect=True)
def test_a_process_waits_for_another_s_and_not_for_a_dead_one_s(
    store: Path, tmp_path: Path
) -> None:
    with held(1.0, tmp_path / "other"):
        started = time.monotonic()
        with owned(store, "one"):
            assert time.monotonic() - started > 0.5
    with held(600, tmp_path / "other") as process:
        process.kill()
        process.wait()
        started = time.monotonic()
        with owned(store, "one"):
            assert time.monotonic() - started < 10, "one of this machine: at once"
    assert left(store) == set()


def test_a_dead_process_of_this_machine_loses_its_lock_at_once(store: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    leave(store, pid=process.pid)
    started = time.monotonic()
    with owned(store, "one") as own:
        assert own
    assert time.monotonic() - started < 2


def test_another_process_under_a_dead_one_s_number_does_not_hold_its_lock(store: Path) -> None:
    leave(store, pid=os.getpid(), born=1.0)
    with owned(store, "one") as own:
        assert own


@pytest.mark.parametrize("signed", [True, False])
def test_a_lock_from_elsewhere_is_lost_when_it_is_not_renewed(
    store: Path, monkeypatch: pytest.MonkeyPatch, signed: bool
) -> None:
    monkeypatch.setattr(locks, "LOST", 0.3)
    path = leave(store, host="elsewhere", token="theirs")
    if not signed:  # its owner has not written who it is
        put(path, "")
    until = time.monotonic() + 0.5

    def lives() -> None:
        while time.monotonic() < until:
            renew(path, "theirs" if signed else "")
            time.sleep(0.02)

    living = threading.Thread(target=lives)
    living.start()
    with owned(store, "one"):
        assert time.monotonic() >= until, "it was renewed for as long"
    living.join()
    assert left(store) == set()


@pytest.mark.parametrize("store", ["file", "memory"], indirect=True)
def test_an_owner_that_wakes_gives_no_sign_beside_another_s_lock(store: Path) -> None:
    path = leave(store)
    before = objects.look(path)
    objects.renew(path, "of one who was taken for dead")
    assert objects.look(path) == before


def test_an_owner_renews_its_lock(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with owned(store, "one"):
        path = store / "running" / "one.lock"
        seen: set[locks.Look | None] = set()
        deadline = time.monotonic() + 10
        while len(seen) < 3:
            assert time.monotonic() < deadline
            seen.add(locks._look(path))
            time.sleep(0.01)
        assert len({look and look[0] for look in seen}) == 1, "what it says is never written again"
    assert left(store) == set()


def test_a_lock_that_was_taken_away_is_not_given_back(store: Path) -> None:
    with owned(store, "one"):
        path = leave(store, token="another's")
        before = locks._look(path)
    assert locks._look(path) == before


def test_an_owner_whose_lock_was_taken_renews_it_no_more_and_is_told(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    require(store, "one")  # holds none, and asks for none
    with owned(store, "one"):
        require(store, "one")
        path = leave(store, token="another's")
        time.sleep(0.1)  # in which a renewal that had begun ends
        before = locks._look(path)
        time.sleep(0.3)
        assert locks._look(path) == before
        with pytest.raises(Lost, match="one: lost its lock to another process, which goes on"):
            require(store, "one")
        locks._give_back(path, {"token": "another's"})
        assert left(store) == set()
        with pytest.raises(Lost):
            require(store, "one")


def test_only_what_was_seen_is_taken_away(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave(store)

    def seen() -> locks.Look:
        found = locks._look(path)
        assert found
        return found

    before = seen()
    leave(store, token="one who came after")
    locks._take_away(path, before)
    before = seen()
    renew(path, "one who came after")
    locks._take_away(path, before)
    before = seen()
    put(path.with_suffix(".free"), f"another is removing {path}")
    locks._take_away(path, before)
    assert seen() == before
    with monkeypatch.context() as patched:
        patched.setattr(locks, "LOST", -1.0)
        locks._take_away(path, before)
    assert seen() == before, "it only found that the other remover had died at it"
    locks._take_away(path, before)
    assert left(store) == set()


def test_a_store_that_takes_no_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "running").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="running"), owned(tmp_path, "one"):
        pass


def test_an_owner_of_this_machine_that_is_suspended_keeps_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOST", 0.2)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    born = psutil.Process(process.pid).create_time()
    process.send_signal(signal.SIGSTOP)
    leave(tmp_path, pid=process.pid, born=born)
    ends = threading.Timer(1.0, process.kill)
    ends.start()
    started = time.monotonic()
    with owned(tmp_path, "one"):
        assert time.monotonic() - started > 0.9, "it could have gone on"
    process.wait()


def test_an_owner_of_this_machine_that_hangs_loses_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOST", 0.5)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    leave(tmp_path, pid=process.pid, born=psutil.Process(process.pid).create_time())
    ends = threading.Timer(20.0, process.kill)
    ends.start()
    started = time.monotonic()
    try:
        with owned(tmp_path, "one"):
            assert 0.4 < time.monotonic() - started < 15, "at once, or only when it had ended"
    finally:
        ends.cancel()
        process.kill()
        process.wait()


def test_a_full_disk_leaves_no_lock_of_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(locks.json, "dumps", full)
        with pytest.raises(RunError), owned(tmp_path, "one"):
            pass
    assert not list((tmp_path / "running").iterdir())
