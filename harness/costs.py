"""What a stage costs: time, memory and bytes as measured, FLOPs and tokens as counted.

Counts depend on models and texts alone (`fusion.flops`), so a budget taken from them is the same
on every machine. What cannot be counted is null in a manifest, never 0: fetching, packing and maps
compute nothing to speak of; a merge's arithmetic is a few operations an element.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.spec import Train
from harness.steps import Plan, Step, root

if TYPE_CHECKING:
    from fusion.flops import FlopCounter, Size


class Meter:
    """Wall, CPU and GPU seconds and peak memory from now on.

    cpu_seconds: of this process and its finished children, all threads. gpu_seconds: wall time
    times the GPUs held, as GPU hours are counted; 0 where none is, None where that is not known.
    peak_memory_bytes: resident memory of the largest process. An interrupted run's share is not
    known.

    here: whether this process holds them; what others hold there is not known, and left out.
    """

    def __init__(self, gpus: int | None = 0, here: bool = True) -> None:
        self.gpus, self.here = gpus, here
        self.wall, self.cpu = time.monotonic(), _cpu_seconds()
        _forget_peak()
        self.children = _children_peak()
        if gpus and here:
            import torch

            # Before the first model is loaded there is no peak, and no device to ask for one.
            for number in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
                torch.cuda.reset_peak_memory_stats(number)

    def cost(self) -> dict[str, Any]:
        """What has been spent since the beginning."""
        wall = time.monotonic() - self.wall
        children = _children_peak()
        peak = max(peak_memory(), children if children > self.children else 0)
        out = {
            "seconds": round(wall, 3),
            "cpu_seconds": round(_cpu_seconds() - self.cpu, 3),
            "gpu_seconds": None if self.gpus is None else round(wall * self.gpus, 3),
            "peak_memory_bytes": peak,
        }
        if self.gpus and self.here:
            import torch

            each = map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))
            out["peak_gpu_memory_bytes"] = max(each)
        return out


def _cpu_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(spent.ru_utime + spent.ru_stime for spent in both)


def _forget_peak() -> None:
    """Let the kernel begin a new peak (Linux); elsewhere the peak is that of the process so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """This process' largest resident memory in bytes, since the kernel last forgot it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return _bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _children_peak() -> int:
    return _bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss * 1024


@contextmanager
def counting(lm: Any) -> Iterator[list[FlopCounter]]:
    """A counter for the model of an lm-eval model, or for each of an ensemble's members.

    None for a member that is no model of this process; members that are one model share a counter.
    """
    from fusion.flops import FlopCounter

    members: list[Any] = [getattr(member, "model", None) for member in getattr(lm, "members", [lm])]
    models = [model for model in members if hasattr(model, "base_model")]
    counters = {key: FlopCounter(model) for key, model in {id(m): m for m in models}.items()}
    try:
        yield [counters[id(model)] for model in models]
    finally:
        for counter in counters.values():
            counter.remove()


def flops(counters: Sequence[FlopCounter]) -> int:
    """FLOPs so far, each counter once."""
    return sum(counter.flops for counter in {id(each): each for each in counters}.values())


def spent_on(counters: Sequence[FlopCounter], before: int) -> dict[str, int | None]:
    """FLOPs since they were `before`, and of one more token: an ensemble's are its members' sum."""
    if not counters:
        return {"flops": None, "flops_per_token": None}
    return {
        "flops": flops(counters) - before,
        "flops_per_token": sum(counter.size.per_token for counter in counters),
    }


def gpus(counters: Sequence[FlopCounter], lm: Any = None) -> int | None:
    """The GPUs that the models are on; without counters as `lm.device` says, else not known."""
    import torch

    if counters or not torch.cuda.is_available():
        return len({str(c.device) for c in counters if c.device.type == "cuda"})
    device = getattr(lm, "device", None)
    return None if device is None else int(str(device).startswith("cuda"))


def written(folder: Path) -> int:
    """Bytes of the files that a folder holds, less the manifest that says so."""
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json")
    return sum(f.stat().st_size for f in files)


def counted(plan: Plan, step: Step) -> dict[str, Any]:
    """FLOPs and tokens of a finished step; null where nothing is counted."""
    if step.kind == "capture":
        from fusion.distributions import open_store
        from fusion.flops import forward

        rows = [entry.get("read", entry["positions"]) for entry in open_store(step.folder).index]
        return {"flops": forward(_size(plan, step.content["row"]), rows), "tokens": sum(rows)}
    if step.kind == "train":
        train = plan.recipe.variants[step.rows[0]].train
        assert train
        return _trained(plan, step, train)
    if step.kind == "statistics":
        return _collected(plan, step)
    return {"flops": None, "tokens": step.tokens}


def _collected(plan: Plan, step: Step) -> dict[str, Any]:
    """Of statistics: readings, and gradients where they are taken; their own sums are left out."""
    content = step.content
    blocks = _blocks(plan, content["corpus"])[: content["blocks"]]
    if content["statistics"] == "fisher":  # piece by piece; one token alone predicts nothing
        blocks = [[piece] for block in blocks for piece in block]
    lengths = source_lengths(plan, content["row"], blocks, content.get("template", "own"))
    if content["statistics"] == "fisher":
        lengths = [length for length in lengths if length > 1]
    own = _size(plan, content["row"])
    return {"flops": collecting(content["statistics"], own, lengths), "tokens": sum(lengths)}


def collecting(statistics: str, size: Size, lengths: Sequence[int]) -> int:
    """FLOPs of the models in taking statistics over rows of these lengths.

    fisher: forward and backward. gram: forward, up to the head. What is done with gradients and
    inputs is left out.
    """
    from fusion.flops import forward, training

    if statistics == "fisher":
        return training(size, lengths)
    return forward(replace(size, head=0), lengths)


def _trained(plan: Plan, step: Step, train: Train) -> dict[str, Any]:
    from fusion.flops import forward, of_steps, training

    blocks = in_order(plan, step)
    lengths = [sum(len(piece.ids) for piece in block) for block in blocks]
    own = _size(plan, train.init)
    trained = adapters(plan, train)
    each = [training(own, [length], trained) for length in lengths]
    if train.budget:
        steps, _ = budget(plan, step)
        flops, tokens = (of_steps(c, train.batch_blocks, steps) for c in (each, lengths))
    else:
        flops, tokens = train.epochs * sum(each), train.epochs * sum(lengths)
    if train.fuse and train.fuse.online:
        flops += train.epochs * sum(
            forward(_size(plan, row), source_lengths(plan, row, blocks, train.fuse.template))
            for row in train.fuse.sources
        )
    return {"flops": flops, "tokens": tokens}


def budget(plan: Plan, step: Step) -> tuple[int, int]:
    """Optimizer steps that bring a row to its budget, and the budget in FLOPs.

    The budget is what the other row takes: its training, and one reading of its blocks by each of
    its sources, whoever else may have paid for those. The steps go on over the row's own blocks in
    their order, the learning rate's schedule stretched over all of them, so that text and order are
    those of every other row of its seed and only the compute differs. The last step may overshoot.

    Relative to the paper (FuseLLM 2401.10491, Tables 1 to 3): its CLM row has the fused row's
    tokens, so less compute by what the sources took.
    """
    from fusion.flops import forward, steps_within, training

    section = plan.recipe.variants[step.rows[0]].train
    assert section
    assert section.budget
    rival = plan.recipe.variants[section.budget].train
    assert rival
    blocks = _blocks(plan, step.content["budget"]["corpus"])
    lengths = [sum(len(piece.ids) for piece in block) for block in blocks]
    total = rival.epochs * training(_size(plan, rival.init), lengths, adapters(plan, rival))
    fuse = rival.fuse
    for row in fuse.sources if fuse else ():
        assert fuse
        total += forward(_size(plan, row), source_lengths(plan, row, blocks, fuse.template))
    own, trained = _size(plan, section.init), adapters(plan, section)
    each = [
        training(own, [sum(len(piece.ids) for piece in block)], trained)
        for block in in_order(plan, step)
    ]
    return steps_within(each, section.batch_blocks, total), total


def adapters(plan: Plan, train: Train) -> int | None:
    """How many weights of adapters are trained; None where all weights are."""
    from fusion.lora import adapter_weights
    from fusion.models import skeleton
    from harness.model_folder import model_folder

    if train.lora is None:
        return None
    folder = model_folder(plan, root(plan.recipe, train.init), weights=False)
    return adapter_weights(skeleton(folder), train.lora)


def source_lengths(
    plan: Plan, row: str, blocks: Sequence[Sequence[Any]], template: str = "own"
) -> list[int]:
    """Tokens of each block as a source cuts it; template: as for `corpus.read_piece`."""
    from fusion.corpus import read_piece
    from fusion.models import load_tokenizer
    from harness.model_folder import model_folder

    tokenizer = load_tokenizer(model_folder(plan, root(plan.recipe, row), weights=False))
    return [
        sum(len(read_piece(tokenizer, piece, template)[0]) for piece in block) for block in blocks
    ]


def _blocks(plan: Plan, corpus: str) -> list[list[Any]]:
    from fusion.corpus import read_blocks

    return read_blocks(plan.steps[corpus].folder / "blocks.parquet")


def in_order(plan: Plan, step: Step) -> list[list[Any]]:
    """The blocks that a training goes through, in its order."""
    from fusion.corpus import drawn_order

    blocks = _blocks(plan, step.content["corpus"])
    if step.content.get("order") != "drawn":
        return blocks
    return [blocks[place] for place in drawn_order(len(blocks), step.content["seed"])]


def _size(plan: Plan, row: str) -> Any:
    from fusion.flops import size
    from fusion.models import skeleton
    from harness.model_folder import model_folder

    return size(skeleton(model_folder(plan, root(plan.recipe, row), weights=False)))
