"""What a person sees while long work runs: a bar on a terminal, plain lines elsewhere.

Whoever works on a folder also leaves a file in the store's `running/`, renewed every few seconds,
from which `kfuse status` tells in another terminal, or on another machine, what runs where.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fusion.errors import RunError
from harness import objects
from harness.store import write_json

BEAT = 5.0  # seconds between two signs of life
_at: dict[str, Any] = {}  # how far the work is that this process has in hand, and what is said


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
    """Add facts to what this process says of its work in the store, for as long as this lasts."""
    _at.update(facts)
    try:
        yield
    finally:
        for name in facts:
            _at.pop(name, None)


@contextmanager
def working(home: Path, folder: str) -> Iterator[None]:
    """Say in the store that this process works on a folder, for as long as it does.

    A disk that takes no more does not stop the work: then only the sign is missing.
    """
    path = home / "running" / f"{folder}.{socket.gethostname()}.{os.getpid()}.json"
    facts = {"folder": folder, "host": socket.gethostname(), "pid": os.getpid()}
    facts |= {"since": time.time()}
    over = threading.Event()
    _at.clear()

    def beat() -> None:
        while True:
            with suppress(OSError, RunError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, facts | _at | {"seen": time.time()})
                if objects.name_of(path):
                    objects.write(path, path.read_text())
            if over.wait(BEAT):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(OSError, RunError):
            path.unlink(missing_ok=True)
            if objects.name_of(path):
                objects.remove(path)
