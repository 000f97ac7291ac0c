"""A folder's files go to the store from who has its lock, and from nobody else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import mirror, objects
from harness.locks import Lost, owned
from harness.store import finish, home
from tests.harness.mirrors import files, made


def test_what_is_worked_on_is_sent_meanwhile_and_in_the_end(
    store: Path, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "EVERY", 0.02)
    folder = at("first") / "models" / "one-00000000"
    there = store / "models" / "one-00000000"
    with mirror.sending(folder):
        made(folder)
        while not (there / "index.json").exists():
            pass
    finish(folder, {})
    (folder / "two.bin").write_text("two")
    with pytest.raises(ZeroDivisionError), mirror.sending(folder):
        raise ZeroDivisionError
    assert (there / "two.bin").exists()
    assert (there / "manifest.json").exists()


def test_who_lost_a_folder_s_lock_sends_nothing_of_it(
    store: Path, at: Callable[[str], Path]
) -> None:
    folder = made(at("first") / "models" / "one-00000000")
    lock = home() / "running" / "one-00000000.lock"
    with owned(home(), folder.name), pytest.raises(Lost), mirror.sending(folder):
        objects.remove(lock)
    assert not files(store)


def test_what_was_finished_here_is_not_sent_while_another_is_at_it(
    store: Path, at: Callable[[str], Path]
) -> None:
    first = at("first")
    mine = made(first / "models" / "one-11111111")
    finish(mine, {"by": "first"})  # and could not be sent
    second = at("second")
    theirs = second / "models" / "one-11111111"
    (theirs / "checkpoints").mkdir(parents=True)
    (theirs / "checkpoints" / "s.bin").write_bytes(b"s")
    (theirs / "index.json").write_text("{}")
    mirror.send(theirs)
    before = files(store)
    lock = '{"host": "another", "space": "", "pid": 1, "born": 0, "token": "x"}'
    assert objects.create(second / "running" / "one-11111111.lock", lock)
    at("first")
    mirror.learn(first)
    after = files(store)
    assert {n: after[n] for n in before} == before
    assert "models/one-11111111/manifest.json" not in after
    objects.remove(first / "running" / "one-11111111.lock")
    mirror.learn(first)
    assert {n: data for n, data in files(store).items() if n.startswith("models/")} == {
        n: data for n, data in files(first).items() if n.startswith("models/")
    }, "nobody is at it any more: it is finished, and all of it is the first one's"


def test_a_sending_that_is_under_way_ends_before_the_lock_is_given_back(
    store: Path, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(at("first") / "models" / "one-11111111")
    begun, late = threading.Event(), threading.Event()
    send, sent = mirror.send, []

    def slow(path: Path, exact: bool = False) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            time.sleep(0.5)
        sent.append(late.is_set())
        send(path, exact)

    monkeypatch.setattr(mirror, "EVERY", 0.01)
    monkeypatch.setattr(mirror, "send", slow)
    with pytest.raises(ZeroDivisionError), mirror.sending(folder):
        _ = 1 / 0 if begun.wait(5) else None
    late.set()
    time.sleep(0.7)
    assert sent == [False, False]
