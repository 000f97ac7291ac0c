"""One owner at a time of what is made in a store, on this machine or on another that shares it.

A lock is a file in `running/` that its owner renews. Whoever finds one waits, and takes it away if
its owner is gone: at once if that was a process of this machine, never while it is suspended, else
when the file has not been renewed for a minute by the clock of the one who waits, since clocks of
machines differ. A file is created exclusively, which folders shared by NFS, Lustre or SMB grant,
too; in an object store it is an object (`harness.objects`). An owner that was silent for so long
and goes on finds another's lock: it asks before it seals what it made, and fails.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fusion.errors import RunError
from harness import objects
from harness.progress import BEAT, LOST, say
from harness.store import clock, space, world

LOOK = 0.2  # seconds between two looks of one who waits
FAR = 2.0  # the same, at an object store

Look = tuple[str, int | str]  # what a lock says, and what changes when it is renewed
_held: dict[Path, dict[str, Any]] = {}  # what this process has locked, and how it signed


class Lost(RunError):
    """A lock was taken away from its owner: what it worked on is another's now."""


@contextmanager
def owned(home: Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of that name; wait: until it is to be had, else give False if it is not.

    RunError if the store takes no file.
    """
    path = home / "running" / f"{name}.lock"
    sign = _sign()
    if not _taken(path, sign) and not (wait and _waited(path, sign)):
        yield False
        return
    over = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, sign, over), daemon=True)
    thread.start()
    _held[path] = sign
    try:
        yield True
    finally:
        if _held.get(path) is sign:
            del _held[path]
        over.set()
        thread.join()
        _give_back(path, sign)


def require(home: Path, name: str) -> None:
    """Lost, if the lock that this process holds was taken away; nothing if it holds none.

    Whoever holds one for long asks before it writes what would overwrite another's work.
    """
    path = home / "running" / f"{name}.lock"
    if path in _held and _is_of(path, _held[path]) is False:
        raise Lost(
            f"{name}: lost its lock to another process, which goes on with it; this one gave no "
            f"sign for {LOST:.0f} s or more (was it suspended, or cut off from the store?)"
        )


def holds(home: Path, name: str) -> bool:
    """Whether this process has the lock of that name, or had it taken away."""
    return home / "running" / f"{name}.lock" in _held


def _sign() -> dict[str, Any]:
    """Who this is: no two owners, not even of one process, say the same."""
    import psutil

    born = psutil.Process().create_time()
    where = {"host": socket.gethostname(), "space": space()}
    return {**where, "pid": os.getpid(), "born": born, "token": uuid.uuid4().hex}


def _taken(path: Path, sign: dict[str, Any]) -> bool:
    """Whether the lock was free and is now this owner's."""
    if objects.name_of(path):
        return objects.create(path, json.dumps(sign))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("x")
    except FileExistsError:
        if path.parent.is_dir():
            return False
        raise RunError(f"{path.parent}: is a file; the store needs a folder there") from None
    except OSError as error:
        raise world(error, path) from error
    try:
        with file:
            file.write(json.dumps(sign))
    except OSError as error:  # a full disk: who comes next need not wait for nobody
        path.unlink(missing_ok=True)
        raise world(error, path) from error
    return True


def _waited(path: Path, sign: dict[str, Any]) -> bool:
    """Wait until the lock is free or its owner gone, and take it."""
    last, since, told = _look(path), time.monotonic(), False
    while True:
        if last:
            gone = _gone(last[0])
            if gone or (gone is None and time.monotonic() - since > LOST):
                _take_away(path, last)
        if _taken(path, sign):
            return True
        found = _look(path)
        if found != last:
            last, since = found, time.monotonic()
        if last and not told and time.monotonic() - since > 2 * LOOK:
            told = True
            owner = _owner(last[0])
            where = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
            say(f"{path.stem}: {where} is at it; waiting")
        time.sleep(FAR if objects.name_of(path) else LOOK)


def _look(path: Path) -> Look | None:
    """What a lock says and when it was renewed; None if there is none."""
    try:
        if objects.name_of(path):
            return objects.look(path)
        return path.read_text(), path.stat().st_mtime_ns
    except OSError:
        return None


def _said(path: Path) -> str:
    """What a lock says; OSError, RunError if it cannot be read."""
    return objects.read(path) if objects.name_of(path) else path.read_text()


def _owner(text: str) -> dict[str, Any] | None:
    """Who owns a lock; None while its owner has not written that down."""
    with suppress(ValueError):
        return dict(json.loads(text))
    return None


def _gone(text: str) -> bool | None:
    """Whether the owner, a process of this machine, is none any more.

    None if it is elsewhere, or lives: one that no longer renews its lock hangs. One that is
    suspended can go on.
    """
    import psutil

    owner = _owner(text)
    if owner is None or (owner["host"], owner["space"]) != (socket.gethostname(), space()):
        return None
    if owner["pid"] == os.getpid():
        own = abs(psutil.Process().create_time() - owner["born"])
        return own > LOST or None  # of a thread, or of a container that was started anew
    try:
        process = psutil.Process(owner["pid"])
        state = process.status()
        another = abs(process.create_time() - owner["born"]) > LOST  # clocks are set
        if another or state == psutil.STATUS_ZOMBIE:
            return True
        return False if state == psutil.STATUS_STOPPED else None
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return None


def _take_away(path: Path, seen: Look) -> None:
    """Remove a lock that still is as it was seen: one remover at a time.

    Without that, a slow remover could remove the lock of an owner who came after the dead one.
    """
    if objects.name_of(path):
        objects.take_away(path, seen, LOST)
        return
    guard = path.with_suffix(".free")
    try:
        guard.touch(exist_ok=False)
    except FileExistsError:
        with suppress(OSError):
            if clock(guard.parent) - guard.stat().st_mtime > LOST:  # a remover died at it
                guard.unlink()
        return
    except OSError as error:
        raise world(error, guard) from error
    try:
        if _look(path) == seen:
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def _is_of(path: Path, sign: dict[str, Any]) -> bool | None:
    """Whether a lock is still this owner's; None if it cannot be read for now."""
    try:
        return (_owner(_said(path)) or {}).get("token") == sign["token"]
    except FileNotFoundError:
        return False
    except (OSError, RunError):  # a network may come again
        return None


def _renew(path: Path, sign: dict[str, Any], over: threading.Event) -> None:
    """Renew a lock for as long as it is this owner's: another's must not seem alive."""
    while not over.wait(BEAT):
        if _is_of(path, sign):
            with suppress(OSError, RunError):
                if objects.name_of(path):
                    objects.renew(path, sign["token"])
                    continue
                os.utime(path)


def _give_back(path: Path, sign: dict[str, Any]) -> None:
    """Remove the lock, unless it was taken away meanwhile and is another's."""
    if _is_of(path, sign):
        with suppress(OSError, RunError):
            objects.remove(path) if objects.name_of(path) else path.unlink()


__all__ = ["LOST", "Lost", "holds", "owned", "require"]
