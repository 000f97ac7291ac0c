"""`make bench`: what alignment, maps and fusion cost, on the quickstart's two models and corpus.

Every figure is the best of some repetitions in one process; where there is a floor it stands beside
the figure. Run it on an idle machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fusion.alignment import align_boundaries, align_dtw
from fusion.corpus import read_blocks
from fusion.distributions import open_store
from fusion.errors import RunError
from fusion.functions import FUSION_FUNCTIONS, fused_block
from fusion.models import load_tokenizer
from fusion.spec import Fuse
from fusion.tokens import tokenize
from fusion.vocabulary import build as build_map
from fusion.vocabulary import load_map
from harness.build import build, model_folder
from harness.plan import Plan, plan
from harness.progress import say
from harness.recipe import load
from harness.store import home

BLOCK = 2048  # target tokens


def best(work: Callable[[], Any], repeat: int = 5) -> float:
    """Seconds of the fastest repetition."""
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def prepared() -> Plan:
    """The quickstart's plan with its fused row built, which needs the stores and maps."""
    recipe = load("quickstart", ()).recipe
    failed = build(plan(recipe, home()), ["fused"])
    if failed:
        raise RunError("; ".join(failed.values()))
    return plan(recipe, home())


def main() -> None:
    """Print one line a figure."""
    planned = prepared()
    tokenizers = {row: load_tokenizer(model_folder(planned, row)) for row in ("smollm2", "gemma3")}
    target, source = tokenizers["smollm2"], tokenizers["gemma3"]
    steps = [step for step in planned.builds() if "fused" in step.rows or step.kind == "pack"]
    blocks = read_blocks(next(s for s in steps if s.kind == "pack").folder / "blocks.parquet")
    text = "\n\n".join(piece.text for block in blocks for piece in block)
    ours, theirs = tokenize(target, text), tokenize(source, text)
    cut = int(ours.ends[BLOCK - 1])
    ends = ours.ends[:BLOCK], theirs.ends[theirs.ends <= cut]
    seconds = best(lambda: [align_boundaries(*ends) for _ in range(100)]) / 100
    say(f"boundary alignment           {BLOCK / seconds:>12,.0f} target tokens/s (floor 1,000,000)")
    names = [
        tokenizer.convert_ids_to_tokens(tokens.ids[: len(end)].tolist())
        for tokenizer, tokens, end in zip((target, source), (ours, theirs), ends, strict=True)
    ]
    seconds = best(lambda: align_dtw(*names), 1)
    say(f"dynamic time warping         {BLOCK / seconds:>12,.0f} target tokens/s")
    seconds = best(lambda: build_map(source, target, "prefix"), 1)
    say(f"prefix map, Gemma to SmolLM2 {seconds:>12.1f} s (floor 10)")
    seconds = best(lambda: build_map(source, target, "min_ed"), 1)
    say(f"min_ed map, same pair        {seconds:>12.1f} s (floor 120)")
    stores = [open_store(s.folder) for s in steps if s.kind == "capture"]
    maps = [load_map(s.folder / "map.npz") for s in steps if s.kind == "map"]
    for store in stores:
        stored = sum(e["bytes"] for e in store.index) / sum(e["positions"] for e in store.index)
        size = store.header["vocabulary"]
        most = 52 if size <= 65_536 else 66
        say(f"store, {size:>7,} tokens        {stored:>12.1f} bytes a position (at most {most})")
    for name in FUSION_FUNCTIONS:
        fused = [0]

        fuse = Fuse.model_validate({"sources": ["-"], "function": name, "clm_weight": 0.9})

        def work(fuse: Fuse = fuse, fused: list[int] = fused) -> None:
            fused[0] = 0
            for number, block in enumerate(blocks):
                read = [store.read(number) for store in stores]
                found, _ = fused_block(fuse, read, maps, block)
                fused[0] += int(np.count_nonzero(found.covered))

        seconds = best(work)
        say(f"store to targets, {name:<11}{fused[0] / seconds:>12,.0f} positions/s (floor 200,000)")


if __name__ == "__main__":
    main()
