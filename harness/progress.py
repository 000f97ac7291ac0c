"""What a person sees while long work runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
            yield lambda done: progress.update(task, completed=done)
    else:
        yield lambda done: None
    say(f"{label}: {total} in {time.monotonic() - started:.1f} s")
