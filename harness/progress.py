"""What a person sees while long work runs: a bar on a terminal, plain lines elsewhere.

Whoever works on a folder also leaves a file in the store's `running/`, renewed every few seconds,
from which `kfuse status` tells in another terminal, or on another machine, what runs where.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from fusion.errors import RunError
from harness import objects
from harness.store import clock, space, write_json

BEAT = 5.0  # seconds between two signs of life
LOST = 12 * BEAT  # seconds without a sign after which whoever is elsewhere is taken for gone
_at: dict[str, Any] = {}  # how far the work is that this process has in hand, and what is said
_writers: list[Callable[[], None]] = []  # of the signs that this process leaves


def say(text: str) -> None:
    """One line of progress, on standard error so that standard output stays the result."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress of `total` parts; call what it yields with the number done."""
    started = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),  # names hold brackets
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(label, total=total)
            yield _counted(total, lambda done: progress.update(task, completed=done))
    else:
        yield _counted(total, lambda done: None)
    say(f"{label}: {total} in {time.monotonic() - started:.1f} s")


def _counted(total: int, told: Callable[[int], None]) -> Callable[[int], None]:
    def progress(done: int) -> None:
        _at.update(done=done, total=total)
        told(done)

    _at.update(done=0, total=total)
    return progress


@contextmanager
def saying(**facts: Any) -> Iterator[None]:
    """Add facts to what this process says of its work in the store, for as long as this lasts.

    They are there, and gone, at once, not with the next sign of life.
    """
    _at.update(facts)
    try:
        _write_signs()
        yield
    finally:
        for name in facts:
            _at.pop(name, None)
        _write_signs()


def _write_signs() -> None:
    for write in list(_writers):
        write()


@contextmanager
def working(home: Path, folder: str, **facts: Any) -> Iterator[None]:
    """Say in the store that this process works on a folder, and facts, for as long as it does.

    Signs that dead processes have left of the same work are taken away. A disk that takes no more
    does not stop the work: then only the sign is missing.
    """
    path = home / "running" / f"{folder}.{socket.gethostname()}.{os.getpid()}.json"
    facts |= {"folder": folder, "host": socket.gethostname(), "pid": os.getpid()}
    facts |= {"space": space()}
    facts |= {"since": time.time()}
    over, alone = threading.Event(), threading.Lock()
    _at.clear()
    with suppress(OSError, RunError):  # a full disk has no clock
        for sign in signs(home, f"{escape(folder)}.*"):
            if sign["folder"] == folder and not lives(sign):
                _take_away(sign["path"])

    def write() -> None:
        with alone, suppress(OSError, RunError):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, facts | _at | {"seen": time.time()})
            except (OSError, RunError):  # it still says that this process lives
                os.utime(path)
            if objects.name_of(path):
                objects.write(path, path.read_text())

    def beat() -> None:
        while True:
            write()
            if over.wait(BEAT):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    _writers.append(write)
    try:
        yield
    finally:
        _writers.remove(write)
        over.set()
        thread.join()
        _take_away(path)


def _take_away(path: Path) -> None:
    with suppress(OSError, RunError):
        path.unlink(missing_ok=True)
        if objects.name_of(path):
            objects.remove(path)


def signs(home: Path, names: str = "*") -> list[dict[str, Any]]:
    """What those who work on a store say; names: a pattern of what they work on.

    `path` and `age` are added: the seconds since a sign was written, by the clock that stamps the
    store's files, for those of machines differ. One that is being written is read next time.
    """
    found = []
    for path in sorted((home / "running").glob(f"{names}.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            sign = json.loads(path.read_text())
            told = {"folder": str(sign["folder"]), "path": path}
            found.append((path.stat().st_mtime, sign | told))
    now = clock(home / "running") if found else 0.0
    return [sign | {"age": now - written} for written, sign in found]


def lives(sign: dict[str, Any]) -> bool:
    """Whether a sign is fresh, and its process is there if it is one of this machine."""
    if float(sign["age"]) > LOST:
        return False
    if (sign.get("host"), sign.get("space")) != (socket.gethostname(), space()):
        return True
    try:
        os.kill(int(sign["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
