"""Which source predicts the corpus best: the share of blocks that each source of a row wins."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusion.errors import RunError
from harness.plan import Plan, Step
from harness.progress import say
from harness.store import identity, write_json
from reports.records import read_json

BLOCKS = 256  # read of a corpus, drawn by the recipe's seed; a share is then known to ±6 points
VERSION = 1  # raise when the same distributions come to other shares


def wins(plan: Plan) -> dict[str, dict[str, Any]]:
    """Of every trained row that fuses stored distributions: shares of its sources, by row.

    Counted once and remembered; what cannot be read is left out with a word why.
    """
    out = {}
    for row, variant in plan.recipe.variants.items():
        step = plan.steps.get(plan.identities[row])
        fuse = variant.train.fuse if variant.train else None
        if not fuse or fuse.online or step is None or not step.done:
            continue
        stores = [plan.steps[key] for key in step.content["fuse"]["sources"]]
        pack = plan.steps[step.content["corpus"]]
        if not all(needed.done for needed in (*stores, pack)):
            continue
        key = identity([VERSION, pack.identity, [s.identity for s in stores], plan.recipe.seed])
        path = plan.home / "data" / f"wins-{key[:16]}.json"
        if not path.exists():
            try:
                write_json(path, shares(pack, stores, plan.recipe.seed))
            except RunError as error:
                say(f"{row}: the report goes without its sources' shares ({error})")
                continue
        out[row] = {"sources": list(fuse.sources)} | read_json(path)
    return out


def shares(pack: Step, stores: list[Step], seed: int) -> dict[str, Any]:
    """Blocks won and bits per byte over all bytes read, in the order of the sources.

    A block's winner has the fewest bits per byte, as MinCE takes it by default; a tie goes to the
    earlier source. RunError if a store is damaged.
    """
    from fusion.corpus import read_blocks
    from fusion.distributions import open_store
    from fusion.measures import bits_per_byte

    blocks = read_blocks(pack.folder / "blocks.parquet")
    opened = [open_store(store.folder) for store in stores]
    order = np.random.default_rng(seed).permutation(len(blocks))[:BLOCKS]
    bits, sizes = [], []
    for number in sorted(int(i) for i in order):
        read = [store.read(number) for store in opened]
        bits.append(bits_per_byte(read, blocks[number]))
        sizes.append(sum(len(piece.text.encode()) for piece in blocks[number]))
    values = np.array(bits)
    won = np.bincount(values.argmin(axis=1), minlength=len(stores)) / len(values)
    return {
        "shares": won.tolist(),
        "bits_per_byte": np.average(values, axis=0, weights=sizes).tolist(),
        "blocks": len(values),
        "of": len(blocks),
    }
