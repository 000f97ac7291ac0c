"""What a recipe's `machine` section comes to here: the device, and the processes that train."""

from __future__ import annotations

from pathlib import Path

from fusion.errors import RunError
from fusion.sharding import DEEPSPEED
from harness.steps import Plan, Step


def device(plan: Plan) -> str:
    """The device that the recipe's machine section comes to here."""
    import torch

    asked = plan.recipe.machine.device
    if asked != "auto":
        if asked.startswith("cuda") and not torch.cuda.is_available():
            raise RunError(f"machine.device: {asked} asked for, but no GPU is there; try auto")
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def held_gpus(plan: Plan, step: Step) -> int:
    """How many GPUs a stage holds: one for each process of those that run models."""
    models = ("capture", "train", "statistics")
    if step.kind not in models or not device(plan).startswith("cuda"):
        return 0
    machine = plan.recipe.machine
    return machine.processes * machine.hosts if step.kind == "train" else 1


def launches(plan: Plan) -> bool:
    """Whether training runs in processes of its own."""
    machine = plan.recipe.machine
    return machine.processes * machine.hosts > 1 or machine.deepspeed is not None


def deepspeed(plan: Plan) -> str | None:
    """The name of a way to shard as it is, a file by its whole path: the job may run elsewhere."""
    name = plan.recipe.machine.deepspeed
    return name if name is None or name in DEEPSPEED else str(Path(name).absolute())
