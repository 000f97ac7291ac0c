"""How the processes that train one model share what training keeps: DeepSpeed's ZeRO, or FSDP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusion.errors import RunError

# What a DeepSpeed file has to say beyond the recipe, which decides on all else.
_COMMON = {
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
_STAGE_3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
_OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
DEEPSPEED: dict[str, dict[str, Any]] = {
    "zero2": _COMMON | {"zero_optimization": {"stage": 2}},
    "zero3": _COMMON | {"zero_optimization": _STAGE_3},
    "zero3_offload": _COMMON
    | {"zero_optimization": _STAGE_3 | _OFFLOAD, "zero_force_ds_cpu_optimizer": False},
}
SHARDINGS = ("none", "zero2", "zero3", "zero3_offload", "fsdp")


def deepspeed_config(name: str | None) -> dict[str, Any] | None:
    """A DeepSpeed config by its name here or from a file, without optimizer and scheduler.

    Those the recipe decides. RunError if there is no such file or it is no JSON object.

    Relative to the paper's code: there the file's own scheduler and AdamW silently replaced the
    stated cosine schedule and betas, and decayed norms that the Trainer leaves alone.
    """
    if name is None or name in DEEPSPEED:
        return DEEPSPEED.get(name or "")
    try:
        content = json.loads(Path(name).read_text())
        return {k: v for k, v in content.items() if k not in ("optimizer", "scheduler")}
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(
            f"machine.deepspeed: {name} is neither one of {', '.join(DEEPSPEED)} nor a file with a "
            f"JSON object ({error})"
        ) from error


def compile_nothing() -> None:
    """Have DeepSpeed's processes on a CPU add up by gloo.

    Else each machine first compiles a sum over shared memory, with all cores for a minute or more,
    and fails where there is no compiler.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def sharding(deepspeed: str | None, fsdp: bool) -> str:
    """Which of SHARDINGS a recipe's machine means; a file by its stage and what it offloads."""
    if fsdp:
        return "fsdp"
    zero = (deepspeed_config(deepspeed) or {}).get("zero_optimization", {})
    if zero.get("stage") == 3:
        return "zero3_offload" if "offload_param" in zero else "zero3"
    return "zero2" if zero.get("stage") == 2 else "none"


def kept(weights: int, how: str, processes: int, width: int) -> int:
    r"""Bytes on each device for weights, gradients and AdamW's moments; activations come on top.

        none: 16 Ψ      zero2: w Ψ + (16 − w) Ψ / N      zero3, fsdp: 16 Ψ / N      zero3_offload: 0

    Ψ weights, N processes, w bytes of a weight in products (4, in bfloat16 2). ZeRO: Rajbhandari et
    al. 2019 (1910.02054), figure 1. What is offloaded is in the host's memory: 16 Ψ.
    """
    if how == "zero3_offload":
        return 0
    if how == "zero2":
        return width * weights + (16 - width) * weights // processes
    return 16 * weights // (1 if how == "none" else processes)
