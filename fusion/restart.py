"""Checkpoints of training that know nothing of who shared the model: any way goes on from any.

One safetensors file in float32: every trained weight θ and AdamW's two moments of it, by the
weight's name. Tensors are gathered and written one at a time, so memory holds one of them.

    θ                weight.NAME
    m, v             exp_avg.NAME, exp_avg_sq.NAME      (Adam, Kingma & Ba 2014, 1412.6980)
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fusion.checkpoints import Entry, write_tensors
from fusion.errors import RunError

FILE = "model.safetensors"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that training changes, by the names that they have in a model nobody shares."""
    found = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if parameter.requires_grad:
            found[name] = parameter
    return found


def write(folder: Path, model: nn.Module, optimizer: Any, writes: bool) -> None:
    """Write weights and moments after a step; all processes call this, and one `writes`.

    optimizer: PyTorch's AdamW, or DeepSpeed's around it.
    """
    _link(optimizer)
    parameters = trained(model)
    entries: dict[str, Entry] = {}
    for name, parameter in parameters.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        for part in (*MOMENTS, WEIGHT):
            entries[f"{part}.{name}"] = ("F32", 4 * torch.Size(shape).numel(), shape)

    def gathered(names: Sequence[str]) -> Iterator[Tensor]:
        for full in names:
            part, _, name = full.partition(".")
            yield _whole(parameters[name], part, optimizer).float().cpu()

    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder, entries, gathered, sum(size for _, size, _ in entries.values()))
    else:
        for _ in gathered(sorted(entries)):
            pass


def agreed(folder: Path, decides: bool) -> Path | None:
    """The checkpoint in a folder that all processes go on from, by what the one who decides sees.

    On a shared disk others may not see it yet. One in another form is named and left out.
    """
    checkpoint = last_checkpoint(folder) if decides else None
    if checkpoint and not holds(checkpoint):
        what = f"{checkpoint}: not in the form of this version; training begins again"
        print(what, file=sys.stderr, flush=True)
        checkpoint = None
    found = [checkpoint]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)
    return found[0]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; its state file is written last."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            step = json.loads((path / "trainer_state.json").read_text())["global_step"]
            whole.append((step, path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    return max(whole)[1] if whole else None


def holds(folder: Path) -> bool:
    """Whether a checkpoint is in this form, and whole as far as its file says."""
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            return any(name.startswith(f"{WEIGHT}.") for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _whole(parameter: nn.Parameter, part: str, optimizer: Any) -> Tensor:
    """One weight, or a moment of it, gathered from all who share it."""
    if _by_deepspeed(parameter):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if part == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, part)
    found = parameter.detach() if part == WEIGHT else optimizer.state[parameter][part]
    return found.full_tensor() if isinstance(found, DTensor) else found


def exact(model: nn.Module, optimizer: Any, writes: bool) -> dict[str, Tensor]:
    """What is saved of a model, trained weights in float32, where a process `writes`; all call it.

    One process's training in bfloat16 leaves float32 weights; so do DeepSpeed's by this.
    """
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    found = {name: buffer.cpu() for name, buffer in buffers.items()} if writes else {}
    for name, parameter in trained(model).items():
        value = _whole(parameter, WEIGHT, optimizer)
        if writes:
            found[name] = value.float().cpu()
    return found


def unround(model: nn.Module, optimizer: Any) -> None:
    """Give trained weights the float32 values that DeepSpeed updates; all processes call this.

    With arithmetic in bfloat16 those that it computes with are rounded.
    """
    for parameter in trained(model).values():
        if _by_deepspeed(parameter):
            parameter.data = _whole(parameter, WEIGHT, optimizer)


def _by_deepspeed(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps its float32 value and moments, in whole or in part."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def read_weights(folder: Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint into a model, before processes come to share it.

    ZeRO-3 has cut it already. RunError if the checkpoint is of another model.
    """
    with _opened(folder) as read, torch.no_grad():
        for name, parameter in trained(model).items():
            gathered: Any = nullcontext()
            if hasattr(parameter, "ds_id"):
                from deepspeed.runtime.zero import GatheredParameters

                gathered = GatheredParameters([parameter], modifier_rank=0)
            with gathered:
                value = read(f"{WEIGHT}.{name}")
                if value.shape != parameter.shape:
                    raise _foreign(folder, f"{name} is {tuple(value.shape)}")
                parameter.copy_(value)


def read_moments(folder: Path, model: nn.Module, optimizer: Any, step: int) -> None:
    """Give the optimizer the moments of a checkpoint as if it had done `step` steps itself.

    Of DeepSpeed also the weights in float32, which a model in bfloat16 does not hold.
    """
    base = _base(optimizer)
    for flat in _flat(optimizer):
        base.state[flat] = _state(base, flat, step)
    _link(optimizer)
    with _opened(folder) as read, torch.no_grad():
        for name, parameter in trained(model).items():
            if _by_deepspeed(parameter):
                for part in (WEIGHT, *MOMENTS):
                    _cut(parameter, part, read(f"{part}.{name}"))
                continue
            base.state[parameter] = _state(base, parameter, step)
            for part in MOMENTS:
                value, kept = read(f"{part}.{name}"), base.state[parameter][part]
                if isinstance(kept, DTensor):
                    value = value.to(kept.device)
                    # Each takes its own piece of what it has read; nothing is sent.
                    value = distribute_tensor(
                        value, kept.device_mesh, kept.placements, src_data_rank=None
                    )
                kept.copy_(value)


def set_schedule(schedule: Any, step: int) -> None:
    """Put a schedule, and the learning rates that it gives, behind so many steps."""
    rates = [
        rate * shape(step)
        for rate, shape in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    schedule.last_epoch, schedule._step_count, schedule._last_lr = step, step + 1, rates
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _cut(parameter: nn.Parameter, part: str, value: Tensor) -> None:
    """Put this process's piece of a weight or moment where DeepSpeed keeps it."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if not hasattr(parameter, "ds_id"):
        if part == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, part)
        return
    # ZeRO-3 cuts every weight in pieces of one size; zeros fill up the last.
    cut: Any = parameter
    size = cut.ds_tensor.numel()
    rank = torch.distributed.get_rank(cut.ds_process_group)
    own = value.flatten()[rank * size : (rank + 1) * size]
    own = nn.functional.pad(own, (0, size - len(own)))
    if part == WEIGHT:
        safe_set_local_fp32_param(parameter, own)
    else:
        safe_set_local_optimizer_state(parameter, own, part)


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """PyTorch's optimizer inside what accelerate and DeepSpeed put around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _flat(optimizer: Any) -> list[Tensor]:
    """The float32 pieces that DeepSpeed's optimizers keep in place of weights."""
    names = [
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # bfloat16 alone
    ]
    return list(next((getattr(optimizer, n) for n in names if hasattr(optimizer, n)), ()))


def _link(optimizer: Any) -> None:
    """Let ZeRO-1 and 2 find every weight's moments.

    They look once, after the first group's first step, when those of other groups are not there.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor, step: int) -> dict[str, Tensor]:
    """What AdamW keeps of a weight after so many steps, the moments still 0."""
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    count = torch.tensor(float(step), device=parameter.device if fused else "cpu")
    return {"step": count} | {part: torch.zeros_like(parameter.detach()) for part in MOMENTS}


@contextmanager
def _opened(folder: Path) -> Iterator[Callable[[str], Tensor]]:
    """A function from a name to the tensor of a checkpoint; RunError where there is none."""
    try:
        opened = safe_open(folder / FILE, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _foreign(folder, str(error)) from error
    with opened as file:
        names = set(file.keys())

        def read(name: str) -> Tensor:
            if name not in names:
                raise _foreign(folder, f"{name} is missing")
            return file.get_tensor(name)

        yield read


def _foreign(folder: Path, what: str) -> RunError:
    return RunError(
        f"{folder}: not a checkpoint of this training ({what}); delete the folder and run again"
    )
