"""A forecast as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from fusion.rates import SUSTAINED
from fusion.sharding import SHARDINGS, kept
from harness.forecast import Forecast, Work, gib
from harness.questions import DISAGREE

UNKNOWN = "not known before it is measured"
BUSY = 0.25  # the share that other work may have before a calibration is said to suffer from it


def table(found: Forecast) -> str:
    """Questions, work and sums for a terminal."""
    from rich.console import Console
    from rich.table import Table

    asked = Table(title="What will be asked", title_justify="left")
    low, high = (f"{share:.0%}" for share in DISAGREE)
    shown = f"smallest gain shown with 80 % power\nif rows differ on {low} / {high} of the items"
    for name in ("suite", "questions", shown, "tokens written, at most"):
        asked.add_column(name)
    for one in found.questions:
        least = UNKNOWN
        if one.detectable:
            least = " / ".join(f"{100 * value:.1f} points" for value in one.detectable)
        cells = (f"{one.n:,} of {one.n_total:,}", least, f"{one.written:,}")
        if one.reason:
            cells = ("unknown", one.reason, "")
        if one.alone:
            cells = (cells[0], "no average: each task alone", cells[2])
        asked.add_row(one.suite, *cells)
        for title, n, gain in one.alone:
            text = " / ".join(f"{100 * value:.1f} points" for value in gain or ())
            asked.add_row(f"  {title}", f"{n:,}", text or UNKNOWN, "")
    done = Table(title="What it will take", title_justify="left")
    for name in ("stage", "of", "tokens", "FLOPs", "time here", "disk", "memory"):
        done.add_column(name, justify="left" if name in ("stage", "of") else "right")
    for work in _by_row(found.work):
        done.add_row(
            work.stage,
            work.name,
            "–" if work.tokens is None else f"{work.tokens:,}",
            "–" if work.flops is None else f"{work.flops:.1e}",
            "–" if work.seconds is None else duration(work.seconds),
            f"{gib(work.disk)} GiB",
            "–" if work.memory is None else f"{gib(work.memory)} GiB",
        )
    console = Console(width=140, markup=False, emoji=False)  # names hold brackets
    with console.capture() as captured:
        if found.questions:
            console.print(asked)
        console.print(done)
    return captured.get().rstrip() + "\n" + sums(found)


def _by_row(work: Sequence[Work]) -> list[Work]:
    """The same with one line for all of a row's measurements."""
    out = [one for one in work if one.stage != "evaluate"]
    rows: dict[str, list[Work]] = {}
    for one in work:
        if one.stage == "evaluate":
            rows.setdefault(one.name.partition(" · ")[0], []).append(one)
    for row, parts in rows.items():
        counted = [part for part in parts if part.flops is not None]
        name = f"{row}, {len(parts)} suites"
        if len(counted) < len(parts):
            name += f", {len(parts) - len(counted)} of them not counted"
        timed = [part.seconds for part in counted if part.seconds is not None]
        memory = [part.memory for part in counted if part.memory is not None]
        out.append(
            Work(
                "evaluate",
                name,
                sum(part.tokens or 0 for part in counted) if counted else None,
                sum(part.flops or 0 for part in counted) if counted else None,
                sum(timed) if timed else None,
                sum(part.disk for part in parts),
                max(memory) if memory else None,
            )
        )
    return out


def sums(found: Forecast) -> str:
    """The whole of it in a line, and what it leaves out."""
    seconds = sum(work.seconds or 0 for work in found.work)
    flops = sum(work.flops or 0 for work in found.work)
    disk = sum(work.disk for work in found.work)
    compute = [w for w in found.work if w.stage in ("capture", "statistics", "train", "evaluate")]
    unknown = sum(work.flops is None for work in compute)
    good = "by a calibration that is good to a factor of two"
    time = f"about {duration(seconds)} on {found.where}, {good}"
    if found.stated:
        good = f"at {SUSTAINED:.0%} of its data sheet"
        time = f"about {seconds / 3600:,.0f} GPU-hours on {found.where}, {good}"
    known = "not known" if 0 < unknown == len(compute) else f"{time}; {flops:.1e} FLOPs"
    line = (
        f"in all: {known}; {gib(disk)} of {gib(found.disk_free)} GiB that are "
        f"free; this machine's memory: {gib(found.memory_total)} GiB"
    )
    if found.busy > BUSY and unknown < len(compute):
        line += f"\nother work had {found.busy:.0%} of this machine meanwhile; alone it takes less"
    if found.stated and found.trained:
        weights, width = found.trained
        each = (f"{how} {gib(kept(weights, how, found.processes, width))}" for how in SHARDINGS)
        line += (
            f"\nmemory of each GPU to train {weights / 1e9:.1f} billion weights in "
            f"{found.processes} processes, without activations: {', '.join(each)} GiB"
        )
    if unknown:
        line += (
            f"\nnot counted: {unknown} of {len(compute)} pieces of work, whose models or questions "
            "are not here yet; `kfuse build` fetches models, `parameters: 7e9` on a source stands "
            "in for one"
        )
    return line


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
