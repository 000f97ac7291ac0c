"""Signs of work: left while it lasts, seen from elsewhere, and gone with it."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import mirror, objects, progress
from harness.progress import bar, lives, signs, working
from harness.store import home, space


def test_whoever_works_is_seen_while_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "BEAT", 0.02)
    seen = []
    with working(tmp_path, "folder-1"), bar("work", 4) as told:
        told(3)
        deadline = time.monotonic() + 10
        while not seen or seen[-1].get("done") != 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            seen += [json.loads(p.read_text()) for p in (tmp_path / "running").glob("[!.]*.json")]
        assert seen[-1]["total"] == 4
        assert seen[-1]["pid"] == os.getpid()
    assert not list((tmp_path / "running").glob("*.json"))
    assert threading.active_count() < 50


def full_disk(_: Path) -> float:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_signs_of_the_dead_go_when_their_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "running"
    folder.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name, pid in (("one-1", dead.pid), ("one-1", os.getppid()), ("two-2", dead.pid)):
        sign = {"folder": name, "host": socket.gethostname(), "pid": pid, "space": space()}
        (folder / f"{name}.{socket.gethostname()}.{pid}.json").write_text(json.dumps(sign))
    (folder / "one-1.x.json").write_text('{"folder": "one-1"}')  # of nobody, and fresh
    with monkeypatch.context() as full:
        full.setattr(progress, "clock", full_disk)
        with working(tmp_path, "one-1"):
            pass
    with working(tmp_path, "one-1"):
        pass
    (folder / "one-1.x.json").unlink()
    left = [(sign["folder"], sign["pid"]) for sign in signs(tmp_path)]
    assert left == [("one-1", os.getppid()), ("two-2", dead.pid)]


def test_a_store_that_takes_nothing_does_not_stop_the_work(tmp_path: Path) -> None:
    (tmp_path / "running").write_text("a file where the folder should be")
    with working(tmp_path, "folder-1"):
        pass


def test_signs_of_work_are_seen_from_elsewhere_and_go_again(
    store: Path, at: Callable[[str], Path]
) -> None:
    first = at("first")
    with working(first, "one-00000000"):
        while not list(store.glob("running/*.json")):
            pass
        second = at("second")
        mirror.learn(home())
        assert [sign["folder"] for sign in signs(second)] == ["one-00000000"]
        at("first")
    at("second")
    mirror.learn(home())
    assert signs(second) == []
    objects.write(second / "running" / "two.json", '{"folder": "two", "host": "elsewhere"}')
    os.utime(store / "running" / "two.json", (1e9, 1e9))
    mirror.learn(home())
    assert [lives(sign) for sign in signs(second)] == [False], "by when it was written there"
