"""Locks of a store: one owner at a time, none that outlives its owner."""

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
from harness import locks
from harness.locks import Lost, owned, require


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOOK", 0.01)


def leave(home: Path, **facts: object) -> Path:
    """A lock that somebody left."""
    path = home / "running" / "one.lock"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(locks._sign() | facts))
    return path


def test_threads_hold_a_lock_one_after_the_other(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(10):
            with owned(tmp_path, "one") as own:
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
    assert not list((tmp_path / "running").iterdir())


def test_who_does_not_wait_is_told(tmp_path: Path) -> None:
    with owned(tmp_path, "one"), owned(tmp_path, "one", wait=False) as own:
        assert not own
    with owned(tmp_path, "one", wait=False) as own:
        assert own


def test_a_dead_process_of_this_machine_loses_its_lock_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    leave(tmp_path, pid=process.pid)
    started = time.monotonic()
    with owned(tmp_path, "one") as own:
        assert own
    assert time.monotonic() - started < 2


def test_another_process_under_a_dead_one_s_number_does_not_hold_its_lock(tmp_path: Path) -> None:
    leave(tmp_path, pid=os.getpid(), born=1.0)
    with owned(tmp_path, "one") as own:
        assert own


@pytest.mark.parametrize("text", [None, ""])
def test_a_lock_from_elsewhere_is_lost_when_it_is_not_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    monkeypatch.setattr(locks, "LOST", 0.3)
    path = leave(tmp_path, host="elsewhere")
    if text is not None:  # its owner has not written who it is
        path.write_text(text)
    until = time.monotonic() + 0.5
    renewing = threading.Thread(target=renew, args=(path, until))
    renewing.start()
    with owned(tmp_path, "one"):
        assert time.monotonic() >= until, "it was renewed for as long"
    renewing.join()


def renew(path: Path, until: float) -> None:
    while time.monotonic() < until:
        os.utime(path)
        time.sleep(0.02)


def test_an_owner_renews_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with owned(tmp_path, "one"):
        path = tmp_path / "running" / "one.lock"
        before = path.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_that_was_taken_away_is_not_given_back(tmp_path: Path) -> None:
    with owned(tmp_path, "one"):
        path = leave(tmp_path, token="another's")
    assert path.exists()


def test_an_owner_whose_lock_was_taken_renews_it_no_more_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    require(tmp_path, "one")  # holds none, and asks for none
    with owned(tmp_path, "one"):
        require(tmp_path, "one")
        path = leave(tmp_path, token="another's")
        before = path.stat().st_mtime_ns
        time.sleep(0.3)
        assert path.stat().st_mtime_ns == before
        with pytest.raises(Lost, match="one: lost its lock to another process, which goes on"):
            require(tmp_path, "one")
        path.unlink()  # the other has ended
        with pytest.raises(Lost):
            require(tmp_path, "one")


def test_only_what_was_seen_is_removed(tmp_path: Path) -> None:
    path = leave(tmp_path)
    seen = locks._look(path)
    assert seen
    leave(tmp_path, token="one who came after")
    locks._take_away(path, seen)
    assert path.exists()
    again = locks._look(path)
    assert again
    path.with_suffix(".free").touch()  # another is removing it
    locks._take_away(path, again)
    assert path.exists()
    path.with_suffix(".free").unlink()
    locks._take_away(path, again)
    assert not path.exists()


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
