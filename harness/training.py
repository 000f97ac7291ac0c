"""Train a variant's target: what a job says, the processes that carry it out, how far they are.

The training itself is `fusion.training`; it reads the job from a file, so that it is the same in
this process, in several, and on several hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from fusion.errors import RunError
from fusion.spec import Train
from harness.costs import budget
from harness.launching import last_step, launch
from harness.locks import require
from harness.machine import deepspeed, device, launches
from harness.model_folder import model_folder
from harness.plan import Plan, Step
from harness.progress import bar, say
from harness.store import read_manifest, write_json


def train_step(plan: Plan, step: Step) -> dict[str, Any]:
    """A trained target, in this process or in several."""
    from fusion.targets import won

    machine = plan.recipe.machine
    train = plan.recipe.variants[step.rows[0]].train
    assert train
    if machine.fsdp and device(plan) == "cpu":
        raise RunError(
            "machine.fsdp: PyTorch's sharding through accelerate needs GPUs, and here is none; "
            "`deepspeed: zero3` shares a model between processes on a CPU, too"
        )
    steps, flops = budget(plan, step) if train.budget else (None, None)
    job = _job(plan, step, train, steps)
    if train.lora:
        from fusion import lora
        from fusion.models import skeleton

        # Before any process starts, so that both are told in a sentence.
        lora.require()
        where = f"variants.{step.rows[0]}.train"
        trained = lora.adapter_weights(skeleton(job["init"]), train.lora, where)
    write_json(step.folder / "job.json", job)
    own = partial(require, plan.home, step.folder.name)
    with _steps(plan, step, job) as told:
        if launches(plan):

            def beat() -> None:
                own()
                told(last_step(step.folder / "training.csv"))

            launch(step.folder / "job.json", machine.processes, machine.hosts, beat)
            facts: dict[str, Any] = {"processes": machine.processes, "hosts": machine.hosts}
        else:
            from fusion.training import train as run

            facts = dict(run(job, own, told))
    facts |= {"budget_flops": flops} if flops else {}
    facts |= {"trained_weights": trained, "peft": version("peft")} if train.lora else {}
    if train.fuse is None:
        return facts
    stores = [source["store"] for source in job["sources"] if "store" in source]
    return facts | {"won": won(train.fuse.sources, stores, job["corpus"]) if stores else None}


def _job(plan: Plan, step: Step, train: Train, steps: int | None) -> dict[str, Any]:
    """What the processes that train read; steps: of the optimizer, where a budget says how many."""
    machine, content = plan.recipe.machine, step.content
    assert plan.recipe.corpus
    sources = []
    for index, row in enumerate(train.fuse.sources if train.fuse else ()):
        assert train.fuse
        source = {"model": str(model_folder(plan, row)), "dtype": train.dtype}
        source["map"] = str(plan.steps[content["fuse"]["maps"][index]].folder / "map.npz")
        if not train.fuse.online:
            source["store"] = str(plan.steps[content["fuse"]["sources"][index]].folder)
        sources.append(source)
    return {
        "init": str(model_folder(plan, train.init)),
        "out": str(step.folder),
        "corpus": str(plan.steps[content["corpus"]].folder / "blocks.parquet"),
        "train": train.model_dump(exclude={"fuse", "lora", "init", "seed", "budget", "domains"}),
        "lora": train.lora.model_dump() if train.lora else None,
        "steps": steps,
        "fuse": train.fuse.model_dump() if train.fuse else None,
        "sources": sources,
        "packing": plan.recipe.corpus.packing,
        "seed": content["seed"],
        "drawn": content.get("order") == "drawn",
        "machine": {
            "device": device(plan),
            "micro_batch": machine.micro_batch,
            "gradient_checkpointing": machine.gradient_checkpointing,
            "checkpoint_every": machine.checkpoint_every,
            "deepspeed": deepspeed(plan),
            "fsdp": machine.fsdp,
        },
    }


@contextmanager
def _steps(plan: Plan, step: Step, job: dict[str, Any]) -> Iterator[Callable[[int], None]]:
    """Progress of a training; call what it yields with the last step that is done."""
    from fusion.flops import steps_of
    from fusion.restart import last_checkpoint

    facts = (read_manifest(plan.steps[step.content["corpus"]].folder) or {})["facts"]
    train = job["train"]
    total = job["steps"] or steps_of(facts["blocks"], train["batch_blocks"], train["epochs"])
    checkpoint = last_checkpoint(step.folder / "checkpoints")
    before = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    if before:
        say(f"{step.name}: {before} of {total} steps trained before, going on")
    with bar(f"{step.name} · steps", total - before) as progress:
        yield lambda done: progress(max(0, done - before))
