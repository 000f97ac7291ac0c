"""Have a model answer a suite's items, pack by pack, and keep the records.

A pack is what goes to the model and to the disk together, so a measurement that is interrupted
loses one pack, may be shared out to any number of processes, and comes to the same records, byte
for byte. Scores are derived from them in a second pass (`scores`) without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from fusion.flops import FlopCounter
from harness import mirror
from harness.asking import ask, read_as, record, times
from harness.costs import Meter, counting, flops, gpus, spent_on
from harness.evaluate import Item, Loaded
from harness.locks import owned, require
from harness.packing import item_batches
from harness.plan import Plan, Step
from harness.progress import bar, say, working
from harness.samples import part, problem, set_aside, spend, waiting, write
from harness.store import identity

GENERATED = 64  # generations of a pack; items of log-likelihoods: packing.CHOICE_ITEMS


@dataclass(frozen=True)
class Pack:
    """Items that are measured and written together, and the label of their part."""

    items: list[Item]
    label: dict[str, Any]


def packs(step: Step, loaded: Loaded) -> list[Pack]:
    """All items of a measurement in packs, always the same ones; no machine setting moves them."""
    formed = [some for pack in item_batches(loaded.items, GENERATED) for some in _cut(pack)]
    label = {"measurement": step.identity, "protocol": loaded.protocol, "packs": len(formed)}
    return [
        Pack(
            items,
            {**label, "pack": number, "items": identity([[*i.key, *i.hashes] for i in items])},
        )
        for number, items in enumerate(formed)
    ]


def _cut(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Items whose generations are no more than a pack's, however often each is sampled."""
    generates = items[0].requests[0].request_type == "generate_until"
    most = max(times(item.requests[0]) for item in items)
    size = max(1, GENERATED // most) if generates else len(items)
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def measure(plan: Plan, step: Step, loaded: Loaded, lm: Any) -> None:
    """Write the records that are missing, then derive scores and write the manifest."""
    from harness.scores import score

    answer(step, loaded, lm)
    score(plan, step, loaded)


def answer(
    step: Step,
    loaded: Loaded,
    lm: Any,
    shard: int = 0,
    shards: int = 1,
    going: Callable[[], bool] = lambda: True,
) -> None:
    """Write the parts that are missing or wrong, of every `shards`-th pack from `shard` on.

    going: asked before each pack; the work ends early once it says no.
    """
    folder = step.folder
    folder.mkdir(parents=True, exist_ok=True)
    formed = packs(step, loaded)
    set_aside(folder, len(formed))
    own = formed[shard::shards]
    left = set(waiting(folder, [pack.label for pack in own]))
    todo = [pack for pack in own if pack.label["pack"] in left]
    label = f"{step.rows[0]} · {step.name}" + (f" · shard {shard + 1}" if shards > 1 else "")
    done = sum(len(pack.items) for pack in own) - sum(len(pack.items) for pack in todo)
    if done and todo:
        say(f"{label}: {done} of {len(loaded.items)} items measured before, going on")
    with (
        working(folder.parent.parent, folder.name),
        bar(label, sum(len(pack.items) for pack in todo)) as progress,
        counting(lm) as counters,
    ):
        finished, later = 0, list[Pack]()
        for number, pack in enumerate(chain(todo, later)):
            if not going():
                return
            lock, again = f"{folder.name}.pack-{pack.label['pack']}", number >= len(todo)
            with owned(folder.parent.parent, lock, wait=again) as ours:
                if not ours:  # another process is at it; what it writes is looked at in the end
                    later.append(pack)
                    continue
                mirror.bring(part(folder, pack.label["pack"]))
                if problem(folder, pack.label):
                    still = partial(require, folder.parent.parent, lock)
                    _measure_pack(folder, pack, loaded.protocol, lm, counters, still)
                    mirror.send(part(folder, pack.label["pack"]))
            finished += len(pack.items)
            progress(finished)


def unfinished(step: Step, loaded: Loaded, shard: int = 0, shards: int = 1) -> bool:
    """Whether a pack, of a shard's if one is given, has no right part yet."""
    return any(problem(step.folder, p.label) for p in packs(step, loaded)[shard::shards])


def _measure_pack(
    folder: Path,
    pack: Pack,
    protocol: str,
    lm: Any,
    counters: Sequence[FlopCounter],
    still: Callable[[], None],
) -> None:
    """Ask what a pack asks and write it down; still: raises if it is another's by then."""
    meter, before = Meter(gpus(counters, lm)), lm.forward_tokens
    how, told = read_as(lm, pack.items)
    counted = flops(counters)
    records = [record(item, found) | {"protocol": protocol} for item, found in ask(lm, pack.items)]
    still()
    spend(
        folder,
        {
            "pack": pack.label["pack"],
            **meter.cost(),
            "tokens": lm.forward_tokens - before,
            **spent_on(counters, counted),
            "engine": {**getattr(lm, "engine", {}), **how},
            "notes": [*getattr(lm, "notes", []), *told],
        },
    )
    write(folder, records, pack.label)
