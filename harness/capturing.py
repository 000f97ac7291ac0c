"""Capture a source's distributions over the blocks: in one piece, or shared out by block.

A block's shard is the same bytes whoever writes it, so any number of processes, here or on other
machines, may each capture a share of a step's blocks. What that costs them is kept in the folder's
ledger until the step's own process gathers the shards into a store and writes the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import mirror
from harness.costs import Meter
from harness.locks import owned, require
from harness.machine import device
from harness.plan import Plan, Step
from harness.progress import bar, working
from harness.samples import LEDGER, spend, spent
from harness.store import provenance

CHUNK = 8  # blocks that one process captures under one lock


def capture_step(plan: Plan, step: Step) -> dict[str, Any]:
    """One source's distributions over the blocks, those that shares have left; facts of them."""
    from fusion.distributions import capture, gather, missing

    blocks = _blocks(plan, step)
    if (step.folder / "header.json").exists() and not missing(step.folder, len(blocks)):
        store = gather(step.folder, len(blocks))
    else:
        model, tokenizer, header = _opened(plan, step)
        template = step.content.get("template", "own")
        with bar(f"{step.name} · distributions, blocks", len(blocks)) as progress:

            def told(done: int) -> None:
                require(plan.home, step.folder.name)
                progress(done)

            store = capture(
                model,
                tokenizer,
                blocks,
                step.folder,
                step.content["top_k"],
                header,
                told,
                template,
            )
    return {"blocks": len(store), "positions": sum(e["positions"] for e in store.index)}


def capture_share(plan: Plan, step: Step, share: int, shares: int) -> None:
    """Capture every `shares`-th chunk of a step's blocks from `share` on, what is there left out.

    RunError and OSError as they come.
    """
    from fusion.distributions import capture_block, missing, write_header

    blocks = _blocks(plan, step)
    chunks = [range(at, min(at + CHUNK, len(blocks))) for at in range(0, len(blocks), CHUNK)]
    own = chunks[share::shares]

    def left(chunk: Sequence[int]) -> list[int]:
        mirror.bring(step.folder, but=mirror.WEIGHTS)
        return [] if step.done else sorted(set(missing(step.folder, len(blocks))) & set(chunk))

    if not any(map(left, own)):
        return
    model, tokenizer, header = _opened(plan, step)
    k, template = step.content["top_k"], step.content.get("template", "own")
    label = f"{step.name} · distributions, blocks of share {share + 1} of {shares}"
    with (
        working(plan.home, step.folder.name),
        bar(label, sum(map(len, own))) as progress,
    ):
        write_header(model, step.folder, k, header)
        done = 0
        for chunk in own:
            lock = f"{step.folder.name}.blocks-{chunk.start}"
            with owned(plan.home, lock):
                meter = Meter(int(model.device.type == "cuda"))
                todo = left(chunk)
                for number in todo:
                    capture_block(
                        model, tokenizer, blocks[number], step.folder, number, k, template
                    )
                    require(plan.home, lock)
                    done += 1
                    progress(done)
                if todo:
                    spend(step.folder, {"pack": chunk.start, "tokens": 0, **meter.cost()})
                    mirror.send(step.folder)


def with_shares(folder: Path, cost: Mapping[str, Any]) -> dict[str, Any]:
    """What a step cost with the shares that others did, whose ledger has then had its use."""
    costs = [*spent(folder), cost]
    (folder / LEDGER).unlink(missing_ok=True)
    out = dict(cost)
    for key in ("seconds", "cpu_seconds", "gpu_seconds"):
        known = [entry.get(key) for entry in costs]
        out[key] = None if None in known else round(sum(map(float, known)), 3)  # type: ignore[arg-type]
    for key in ("peak_memory_bytes", "peak_gpu_memory_bytes"):
        if peaks := [entry[key] for entry in costs if key in entry]:
            out[key] = max(peaks)
    return out


def _blocks(plan: Plan, step: Step) -> list[list[Any]]:
    from fusion.corpus import read_blocks

    return read_blocks(plan.steps[step.content["corpus"]].folder / "blocks.parquet")


def _opened(plan: Plan, step: Step) -> tuple[Any, Any, dict[str, Any]]:
    """The source's model and tokenizer, and the facts that identify its store."""
    from fusion.models import load_model, load_tokenizer, require_fit
    from fusion.tokens import fingerprint
    from harness.model_folder import model_folder

    folder = model_folder(plan, step.content["row"])
    model = load_model(folder, step.content["dtype"], device(plan))
    tokenizer = load_tokenizer(folder)
    require_fit(model.config, tokenizer.vocab_size, folder)
    header = {
        "model": step.content["source"],
        "tokenizer": fingerprint(tokenizer),
        "corpus": step.content["corpus"],
        "dtype": step.content["dtype"],
        "code": provenance() | {"capture": step.content["version"]},
    }
    return model, tokenizer, header
