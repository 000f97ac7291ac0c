"""Share the packs of a row's measurements out to processes, each with its device and its model.

Packs are formed before they are shared out and a part is the same bytes whoever writes it, so the
number of shards changes no record. A process keeps as many torch threads as one alone would have,
because the number of threads moves the last digits of a sum; on one CPU, shards therefore gain
little. A process that dies takes its pack with it, and no other.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from fusion.errors import RunError
from harness.answering import packs
from harness.evaluate import Loaded
from harness.machine import device
from harness.plan import Plan, Step
from harness.progress import bar
from harness.samples import part


@dataclass(frozen=True)
class Share:
    """What a process is given: its number among how many, its device, its torch threads."""

    shard: int
    shards: int
    device: str
    threads: int


def devices(plan: Plan) -> list[str]:
    """A device for each shard: the GPUs in turn, or the one that the recipe names."""
    import torch

    place = device(plan)
    count = torch.cuda.device_count() if place == "cuda" else 0
    shards = plan.recipe.machine.shards
    return [f"cuda:{shard % count}" if count else place for shard in range(shards)]


def measure_shards(plan: Plan, row: str, todo: Sequence[tuple[Step, Loaded]]) -> dict[str, str]:
    """Write the missing parts of a row's measurements; reasons by the step's identity.

    A reason without a step, under "", is that of a process that died.
    """
    import torch

    places = devices(plan)
    # One server reads the libraries once and forks from there, before any device is touched.
    context = get_context("forkserver")
    context.set_forkserver_preload(["harness.measuring"])
    steps = [step for step, _ in todo]
    running: dict[int, tuple[int, Any]] = {}  # by sentinel
    receivers: list[Connection] = []
    reasons: dict[str, str] = {}
    processes = []
    try:
        for shard, place in enumerate(places):
            share = Share(shard, len(places), place, torch.get_num_threads())
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(plan, row, steps, share, sender))
            process.start()
            sender.close()
            processes.append(process)
            receivers.append(receiver)
            running[process.sentinel] = (shard, process)
        total = [(step, pack) for step, loaded in todo for pack in packs(step, loaded)]
        label = f"{row} · {len(places)} shards"
        with bar(label, sum(len(pack.items) for _, pack in total)) as progress:
            while running:
                ended = wait([*running, *receivers], timeout=1)
                _hear(receivers, reasons)
                for sentinel in set(running) & set(ended):
                    shard, process = running.pop(sentinel)
                    process.join()
                    _hear(receivers, reasons)
                    if process.exitcode:
                        where = f"shard {shard + 1} of {len(places)} ({places[shard]})"
                        last = reasons.pop("?", "")
                        reasons[""] = f"{where} {_end(process.exitcode)}{last}"
                there = [len(p.items) for s, p in total if part(s.folder, p.label["pack"]).exists()]
                progress(sum(there))
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
    return reasons


def _hear(receivers: list[Connection], reasons: dict[str, str]) -> None:
    """Take in what processes have said so far; one whose end is closed is forgotten."""
    for receiver in list(receivers):
        try:
            while receiver.poll():
                key, reason = receiver.recv()
                reasons[key] = reason
        except (EOFError, OSError):
            receivers.remove(receiver)


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with exit status {code}"
    hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
    return f"was ended by signal {-code} ({signal.Signals(-code).name}{hint})"


def _work(plan: Plan, row: str, steps: Sequence[Step], share: Share, sender: Connection) -> None:
    """The life of one process; a reason is sent for what could not be measured."""
    # Ctrl-C goes to every process of the terminal; the parent ends its children itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    from harness.measuring import Measuring

    # Not the parent's number: that is the server's, which lives on as long as its children.
    command = parent_process()
    assert command
    torch.set_num_threads(share.threads)
    measuring = Measuring(plan, share.device)
    try:
        for step in steps:
            try:
                measuring.answer(row, step, share.shard, share.shards, command.is_alive)
            except RunError as error:
                sender.send((step.identity, str(error)))
    except BaseException as error:
        sender.send(("?", f": {type(error).__name__}: {error}"))
        raise
    finally:
        sys.stderr.flush()
