"""`make bench`: what alignment, maps, capture, fusion and the loss cost, beside their floors.

Every figure is the best of some repetitions in one process; ratios are of two works done in turn on
the same data. The quickstart's models and corpus are used, and built first if need be. Run it on an
idle machine; `python -m harness.bench loss capture` runs parts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fusion.alignment import align_boundaries, align_dtw
from fusion.corpus import Piece, read_blocks
from fusion.distributions import open_store, predict, read_block
from fusion.errors import RecipeError, RunError
from fusion.functions import FUSION_FUNCTIONS, fused_block
from fusion.losses import CHUNK, Targets, fused_loss
from fusion.models import causal_pattern, hidden_states, load_model, load_tokenizer
from fusion.spec import Fuse
from fusion.targets import FusedTargets
from fusion.tokens import tokenize
from fusion.training import Blocks, collate
from fusion.vocabulary import build as build_map
from fusion.vocabulary import load_map
from harness.bench_ensembles import ensembles
from harness.bench_executor import executor
from harness.bench_merging import merging
from harness.bench_report import report
from harness.build import build
from harness.machine import device
from harness.model_folder import model_folder
from harness.parity import parity
from harness.peers import scoring
from harness.plan import Plan, plan
from harness.progress import say
from harness.recipe import load
from harness.store import home

BLOCK = 2048  # target tokens
SOURCES = ("smollm2", "gemma3")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def best(*works: Callable[[], Any], repeat: int = 5) -> list[float]:
    """Seconds of the fastest repetition of each work, all done in turn."""
    seconds = [float("inf")] * len(works)
    for _ in range(repeat):
        for index, work in enumerate(works):
            started = time.perf_counter()
            work()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            seconds[index] = min(seconds[index], time.perf_counter() - started)
    return seconds


def prepared() -> Plan:
    """The quickstart's plan in larger blocks, its fused row and so all that is used here built."""
    recipe = load("quickstart", (f"corpus.blocks={BLOCK}",)).recipe
    failed = build(plan(recipe, home()), ["fused"])
    if failed:
        raise RunError("; ".join(failed.values()))
    return plan(recipe, home())


def blocks_of(planned: Plan) -> list[list[Piece]]:
    """The quickstart's blocks."""
    packed = next(s for s in planned.builds() if s.kind == "pack")
    return read_blocks(packed.folder / "blocks.parquet")


def alignment() -> None:
    """Pairs of positions and vocabulary maps."""
    planned = prepared()
    target, source = (load_tokenizer(model_folder(planned, row)) for row in SOURCES)
    text = "\n\n".join(piece.text for block in blocks_of(planned) for piece in block)
    ours, theirs = tokenize(target, text), tokenize(source, text)
    cut = int(ours.ends[BLOCK - 1])
    ends = ours.ends[:BLOCK], theirs.ends[theirs.ends <= cut]
    (seconds,) = best(lambda: [align_boundaries(*ends) for _ in range(100)])
    rate = 100 * BLOCK / seconds
    say(f"boundary alignment           {rate:>12,.0f} target tokens/s (floor 1,000,000)")
    names = [
        tokenizer.convert_ids_to_tokens(tokens.ids[: len(end)].tolist())
        for tokenizer, tokens, end in zip((target, source), (ours, theirs), ends, strict=True)
    ]
    (seconds,) = best(lambda: align_dtw(*names), repeat=1)
    say(f"dynamic time warping         {BLOCK / seconds:>12,.0f} target tokens/s")
    (seconds,) = best(lambda: build_map(source, target, "prefix"), repeat=1)
    say(f"prefix map, Gemma to SmolLM2 {seconds:>12.1f} s (floor 10)")
    (seconds,) = best(lambda: build_map(source, target, "min_ed"), repeat=1)
    say(f"min_ed map, same pair        {seconds:>12.1f} s (floor 120)")


def fusion() -> None:
    """From the stores of two sources to fused targets and training batches."""
    planned, blocks = prepared(), blocks_of(prepared())
    steps = [step for step in planned.builds() if "fused" in step.rows]
    folders = [s.folder for s in steps if s.kind == "capture"]
    stores = [open_store(folder) for folder in folders]
    files = [s.folder / "map.npz" for s in steps if s.kind == "map"]
    maps = [load_map(file) for file in files]
    for store in stores:
        stored = sum(e["bytes"] for e in store.index) / sum(e["positions"] for e in store.index)
        size = store.header["vocabulary"]
        most = 52 if size <= 65_536 else 66
        say(f"store, {size:>7,} tokens        {stored:>12.1f} bytes a position (at most {most})")
    for name in FUSION_FUNCTIONS:
        fuse = Fuse.model_validate({"sources": ["-"], "function": name, "clm_weight": 0.9})
        fused = [0]

        def work(fuse: Fuse = fuse, fused: list[int] = fused) -> None:
            fused[0] = 0
            for number, block in enumerate(blocks):
                read = [store.read(number) for store in stores]
                found, _ = fused_block(fuse, read, maps, block)
                fused[0] += int(np.count_nonzero(found.covered))

        (seconds,) = best(work)
        say(f"store to targets, {name:<16}{fused[0] / seconds:>10,.0f} positions/s (floor 200,000)")
    read = [{"store": str(a), "map": str(b)} for a, b in zip(folders, files, strict=True)]
    fuse = Fuse.model_validate({"sources": ["-"], "function": "min_ce", "clm_weight": 0.9})
    rows = Blocks(blocks, FusedTargets(fuse, read, "-", "cpu"))
    (seconds,) = best(lambda: collate([rows[0]]), repeat=20)
    say(f"collate {BLOCK:,} tokens, 2 sources {1000 * seconds:>8.1f} ms (floor 10)")


def capture() -> None:
    """What top-k and the rest cost over the bare forward pass of the same batches."""
    planned = prepared()
    block = blocks_of(planned)[0]
    for row in SOURCES:
        folder = model_folder(planned, row)
        tokenizer = load_tokenizer(folder)
        for dtype in ("float32", "bfloat16"):
            model = load_model(folder, dtype, device(planned))
            ids, segments, positions, _ = read_block(tokenizer, block, model.device)

            def bare(m: Any = model, i: Any = ids, s: Any = segments, p: Any = positions) -> None:
                with torch.inference_mode():
                    pattern = causal_pattern(s, torch.ones_like(s, dtype=torch.bool))
                    m.get_output_embeddings()(hidden_states(m, i, p, pattern))

            def whole(m: Any = model, t: Any = tokenizer) -> None:
                predict(m, t, block, 16)

            one, two = best(bare, whole, repeat=7)
            label = f"capture, {row}, {dtype}"
            rate = ids.numel() / two
            say(f"{label:<29}{rate:>12,.0f} positions/s, {two / one - 1:+.0%} on the bare forward")


def loss() -> None:
    """Time and memory of the combined loss, forward and backward, against cross-entropy alone."""
    T, K = (8192, 32) if DEVICE == "cuda" else (1024, 32)
    for V, D in ((49_152, 576), (128_256, 2048), (262_144, 640)):
        if DEVICE == "cpu" and D > 1000:
            continue
        g = torch.Generator().manual_seed(1)
        head = torch.randn(V, D, generator=g) / D**0.5
        hidden, labels = torch.randn(T, D, generator=g), torch.randint(0, V, (T,), generator=g)
        p = torch.rand(T, K, generator=g)
        ids = torch.randint(0, V // K, (T, K), generator=g) + torch.arange(K) * (V // K)
        p = 0.9 * p / p.sum(-1, keepdim=True)
        head, hidden, labels, ids, p = (x.to(DEVICE) for x in (head, hidden, labels, ids, p))
        head.requires_grad_()
        hidden.requires_grad_()
        targets = Targets(ids, p, torch.full((T,), 1 / T, device=DEVICE))

        def alone(h: Any = hidden, w: Any = head, y: Any = labels) -> None:
            for at in range(0, T, CHUNK):
                z = (h[at : at + CHUNK] @ w.T).float()
                part = torch.nn.functional.cross_entropy(z, y[at : at + CHUNK], reduction="sum")
                (part / T).backward()
            h.grad = w.grad = None

        def ours(
            h: Any = hidden, w: Any = head, y: Any = labels, t: Any = targets, name: str = "kl"
        ) -> None:
            fused_loss(h, w, y, t, 0.9, objective=name).total.backward()
            h.grad = w.grad = None

        works = (alone, lambda ours=ours: ours(t=None), ours, lambda ours=ours: ours(name="jsd"))
        seconds = best(*works, repeat=3)
        say(
            f"loss, V = {V:,}, T = {T:,}: chunked cross-entropy {seconds[0]:.3f} s, ours "
            f"{seconds[1] / seconds[0]:.2f} times that for cross-entropy, "
            f"{seconds[2] / seconds[0]:.2f} with KL, {seconds[3] / seconds[0]:.2f} with JSD "
            "(floor 1.3)"
        )
        if DEVICE == "cuda":
            for label, work in (("chunked", alone), ("ours", ours)):
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                work()
                peak = (torch.cuda.max_memory_allocated() - before) / 2**20
                say(f"  peak above the inputs, {label}: {peak:,.0f} MiB")


PARTS: dict[str, Callable[[], None]] = {
    "alignment": alignment,
    "fusion": fusion,
    "capture": capture,
    "loss": loss,
    "scoring": scoring,
    "parity": parity,
    "ensembles": ensembles,
    "merging": merging,
    "report": report,
    "executor": executor,
}


def main() -> None:
    """Print one line a figure, of the parts that are named, or of all."""
    unknown = [name for name in sys.argv[1:] if name not in PARTS]
    if unknown:
        raise RecipeError(f"bench {', '.join(unknown)}: known parts: {', '.join(PARTS)}")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
