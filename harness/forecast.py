"""`kfuse plan`: what a recipe will take and what its measurements can show, before any compute.

FLOPs come from the formulas of the cost ledger, tokens of questions from `questions`, seconds from
a calibration of this machine or from the data sheet of a GPU that is named. What is not known yet
(a model that is neither here nor has `parameters`, questions that cannot be had) is said to be
unknown, and counts for nothing in the sums.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion.spec import Train
from harness.machine import device
from harness.questions import Questions, counted
from harness.steps import Plan, Step, root
from harness.store import existing

if TYPE_CHECKING:
    from fusion.flops import Size
    from fusion.rates import Rates

RECORD = 1_500  # bytes of an item's record; more than any of the quickstart's
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """One folder still to be made."""

    stage: str
    name: str
    tokens: int | None
    flops: int | None
    seconds: float | None
    disk: int
    memory: int | None  # resident, of weights and what training keeps beside them


@dataclass(frozen=True)
class Forecast:
    """Everything that is still to be done, and what there is to do it with."""

    questions: tuple[Questions, ...]
    work: tuple[Work, ...]
    disk_free: int
    memory_total: int
    where: str  # the device, or the GPU that was named
    stated: bool = False  # seconds are of a data sheet and of one GPU, and nothing was calibrated
    processes: int = 1  # that train, each on its own GPU
    trained: tuple[int, int] | None = None  # of the largest model: weights, bytes each in products
    dtype: str = "float32"  # that models are measured and read in
    busy: float = 0.0  # the share of the processors that other work had when they were calibrated

    @property
    def refusals(self) -> list[str]:
        """What cannot fit, each with a remedy."""
        disk = sum(work.disk for work in self.work)
        out = []
        if disk > self.disk_free:
            out.append(
                f"disk: about {gib(disk)} GiB are needed, {gib(self.disk_free)} GiB are free; "
                "make room, or set KFUSE_HOME to another disk"
            )
        for work in self.work:
            if work.memory is not None and work.memory > self.memory_total:
                remedy = "train in more processes with `machine.deepspeed`, or a smaller model"
                if work.stage != "train":
                    whole = self.dtype == "float32"
                    remedy = "`evaluate.dtype: bfloat16`" if whole else "a device with more memory"
                    remedy += ", or a smaller model"
                out.append(
                    f"{work.stage} {work.name}: at least {gib(work.memory)} GiB of memory are "
                    f"needed, {self.where} has {gib(self.memory_total)} GiB; {remedy}"
                )
        return out


def gib(size: int) -> str:
    """Bytes in GiB, one decimal."""
    return f"{size / 2**30:.1f}"


Sizes = dict[str, "tuple[Size, int] | None"]  # by source: its size and number of weights


def forecast(plan: Plan, steps: Sequence[Step], gpu: str | None = None) -> Forecast:
    """What these steps will take on this machine, or on GPUs of a kind.

    steps: as `run.pending` gives them. gpu: a key of `fusion.rates.GPUS`.
    """
    from harness.measuring import Measuring

    where = gpu or device(plan)
    measuring, questions = Measuring(plan), {}
    for step in steps:
        if step.kind == "evaluate" and step.name not in questions:
            questions[step.name] = counted(plan, measuring, step)
    busy = _busy() if where == "cpu" else 0.0
    work = works(plan, steps, questions, where, rates_of(plan, where))
    sizes = _sizes(plan)
    trained = [
        (known[1], BYTES[_dtype(plan, step)])
        for step in steps
        if step.kind == "train" and "lora" not in step.content
        if (known := sizes.get(root(plan.recipe, step.rows[0])))
    ]
    return Forecast(
        tuple(questions.values()),
        tuple(work),
        shutil.disk_usage(existing(plan.home)).free,
        _memory(where),
        where,
        gpu is not None,
        plan.recipe.machine.processes * plan.recipe.machine.hosts,
        max(trained, default=None),
        plan.recipe.evaluate.dtype,
        busy,
    )


def works(
    plan: Plan,
    steps: Sequence[Step],
    questions: dict[str, Questions],
    where: str,
    rates: dict[str, Rates],
) -> list[Work]:
    """What each step takes; questions: by suite, of all measurements among the steps.

    rates: by the dtype of models; seconds are in their terms. where: a device or a kind of GPU.
    """
    sizes = _sizes(plan)
    return [_work(plan, step, sizes, questions, rates, where) for step in steps]


def _sizes(plan: Plan) -> Sizes:
    return {row: _model(plan, row) for row in plan.recipe.sources}


def rates_of(plan: Plan, where: str) -> dict[str, Rates]:
    """How fast models of the recipe's dtypes are: calibrated, or by a GPU's data sheet."""
    from fusion.rates import GPUS, measure, stated

    trains = {v.train.dtype for v in plan.recipe.variants.values() if v.train}
    dtypes = {plan.recipe.evaluate.dtype, *trains}
    if where in GPUS:
        return dict.fromkeys(dtypes, stated(where, plan.recipe.machine.generate_rows))
    return {dtype: measure(where, dtype) for dtype in dtypes}


def _busy() -> float:
    """The share of this machine's processors that other work has, seen for half a second."""
    import psutil

    return psutil.cpu_percent(0.5) / 100


def _memory(where: str) -> int:
    from fusion.rates import GPUS

    if where in GPUS:
        return GPUS[where][2]
    if where.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(where).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def _model(plan: Plan, row: str) -> tuple[Size, int] | None:
    """A source's size and number of weights, if its configuration is here or the recipe says it.

    Of a number alone all weights count as products, and attention to other tokens is left out.
    """
    from fusion.flops import Size, size
    from fusion.models import skeleton
    from harness.model_folder import model_folder

    folder = model_folder(plan, row, weights=False)
    if not (folder / "config.json").is_file():
        told = plan.recipe.sources[row].parameters
        return (Size(round(told), 0, 0), round(told)) if told else None
    model = skeleton(folder)
    return size(model), sum(weight.numel() for weight in model.parameters())


def _work(
    plan: Plan,
    step: Step,
    sizes: Sizes,
    questions: dict[str, Questions],
    rates: dict[str, Rates],
    where: str,
) -> Work:
    if step.kind == "evaluate":
        return _measurement(plan, step, sizes, questions[step.name], rates)
    tokens = flops = seconds = memory = None
    row = step.content.get("row", step.rows[0])
    known = sizes.get(root(plan.recipe, row))
    if step.kind in ("capture", "train", "statistics"):
        tokens = step.tokens
        flops = _computed(plan, step, sizes) if known and plan.recipe.corpus else None
        dtype = _dtype(plan, step)
        if flops is not None and dtype in rates:
            reads = step.kind == "capture" or step.content.get("statistics") == "gram"
            seconds = flops / (rates[dtype].read if reads else rates[dtype].train)
    if known and step.kind in ("train", "statistics"):
        memory = _trained(plan, step, known[1], where)
    elif known and step.kind == "capture":
        memory = BYTES[_dtype(plan, step)] * known[1]
    return Work(step.kind, step.name, tokens, flops, seconds, step.disk, memory)


def _trained(plan: Plan, step: Step, weights: int, where: str) -> int | None:
    """Bytes that training keeps at least on a device; processes on a CPU share one memory.

    Statistics keep no moments but one square a weight. Beside adapters the model's own weights
    have neither gradients nor moments; None where it is not known how many weights adapters have.
    """
    from fusion.sharding import kept, sharding
    from harness.costs import adapters

    if step.kind == "statistics":
        return 12 * weights
    machine = plan.recipe.machine
    beside = machine.processes if where == "cpu" else 1
    how = sharding(machine.deepspeed, machine.fsdp)
    width, processes = BYTES[_dtype(plan, step)], machine.processes * machine.hosts
    train = plan.recipe.variants[step.rows[0]].train
    if train is None or train.lora is None:
        return beside * kept(weights, how, processes, width)
    if _unseen(plan, train):
        return None
    trained = kept(adapters(plan, train) or 0, how, processes, width)
    return beside * (trained + weights * (4 if how == "none" else width))


def _unseen(plan: Plan, train: Train) -> bool:
    """Whether it trains adapters of a model whose matrices are not known before it is here."""
    from harness.model_folder import model_folder

    folder = model_folder(plan, root(plan.recipe, train.init), weights=False)
    return train.lora is not None and not (folder / "config.json").is_file()


def _computed(plan: Plan, step: Step, sizes: Sizes) -> int | None:
    """FLOPs over full blocks; None where a model that counts is not here.

    A row with a budget takes what the other row and its sources take.
    """
    from fusion.flops import forward, training
    from harness.costs import adapters, collecting

    def of(row: str) -> Size | None:
        known = sizes.get(root(plan.recipe, row))
        return known[0] if known else None

    own = of(step.content.get("row", step.rows[0]))
    variant = plan.recipe.variants.get(step.rows[0])
    train = variant.train if variant and step.kind == "train" else None
    if train and train.budget:
        rival = plan.recipe.variants[train.budget].train
        assert rival
        own, train = of(rival.init), rival
    if own is None or train and _unseen(plan, train):
        return None
    lengths = _lengths(plan, step.tokens if train is None else step.tokens // train.epochs)
    if step.kind == "statistics":
        return collecting(step.content["statistics"], own, lengths)
    if train is None:
        return forward(own, lengths)
    total = train.epochs * training(own, lengths, adapters(plan, train))
    fuse = train.fuse
    if fuse and (fuse.online or variant and variant.train is not train):
        found = [of(row) for row in fuse.sources]
        if any(one is None for one in found):
            return None
        total += sum(forward(one, lengths) for one in found if one)
    return total


def _lengths(plan: Plan, tokens: int) -> list[int]:
    """Full blocks of so many tokens, and what is left."""
    corpus = plan.recipe.corpus
    assert corpus
    whole, rest = divmod(tokens, corpus.blocks)
    return [corpus.blocks] * whole + [rest] * (rest > 0)


def _dtype(plan: Plan, step: Step) -> str:
    if step.kind == "capture":
        return str(step.content["dtype"])
    train = plan.recipe.variants[step.rows[0]].train
    return str(train.dtype) if train else "float32"


def _measurement(
    plan: Plan,
    step: Step,
    sizes: Sizes,
    asked: Questions,
    rates: dict[str, Rates],
) -> Work:
    """A row on a suite; an ensemble is the sum of its members."""
    row = step.rows[0]
    variant = plan.recipe.variants.get(row)
    members = list(variant.ensemble.members) if variant and variant.ensemble else [row]
    roots = [root(plan.recipe, member) for member in members]
    known = [sizes.get(name) for name in roots]
    dtype = plan.recipe.evaluate.dtype
    disk = RECORD * asked.n + 4 * asked.written
    if asked.reason or any(k is None for k in known):
        return Work("evaluate", f"{row} · {step.name}", None, None, None, disk, None)
    flops, seconds, tokens = 0, 0.0, 0
    for name, found in zip(roots, known, strict=True):
        assert found
        read, written = asked.read[name] * found[0].per_token, asked.written * found[0].per_token
        flops += round(read + written)
        tokens += round(asked.read[name]) + asked.written
        if dtype in rates:
            seconds += read / rates[dtype].read + written / rates[dtype].write
    memory = sum(BYTES[dtype] * found[1] for found in known if found)
    spent = seconds if dtype in rates else None
    return Work("evaluate", f"{row} · {step.name}", tokens, flops, spent, disk, memory)
