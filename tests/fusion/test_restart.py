"""Checkpoints that any way goes on from: what they hold, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerState, get_cosine_schedule_with_warmup

from fusion import training
from fusion.errors import RunError
from fusion.restart import (
    holds,
    last_checkpoint,
    read_moments,
    read_weights,
    set_schedule,
    trained,
    write,
)
from fusion.training import train
from tests.fusion.jobs import ALIKE, FSDP_ON_CPUS, in_two_processes, job, rows, weights
from tests.warm import Warm
from tests.warm import job as alone


class Run:
    """A small model with a frozen part, AdamW in two groups, and a schedule."""

    def __init__(self, fused: bool = False) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1))
        self.model[2].requires_grad_(False)
        groups = [
            {"params": list(self.model[0].parameters()), "weight_decay": 0.1},
            {"params": list(self.model[1].parameters()), "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1, fused=fused)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, 2, 9)

    def go(self, first: int, last: int) -> None:
        for step in range(first, last):
            batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            self.model(batch).square().sum().backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
def test_what_goes_on_is_to_the_last_bit_what_was_not_interrupted(
    tmp_path: Path, fused: bool
) -> None:
    whole, part, rest = Run(fused), Run(fused), Run(fused)
    whole.go(0, 7)
    part.go(0, 3)
    write(tmp_path, part.model, part.optimizer, writes=True)
    read_weights(tmp_path, rest.model)
    read_moments(tmp_path, rest.model, rest.optimizer, 3)
    set_schedule(rest.schedule, 3)
    rest.go(3, 7)
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.schedule.get_last_lr() == rest.schedule.get_last_lr()


def test_a_checkpoint_holds_what_is_trained_and_its_moments_by_name(tmp_path: Path) -> None:
    run = Run()
    run.go(0, 1)
    write(tmp_path / "none", run.model, run.optimizer, writes=False)
    assert not (tmp_path / "none").exists()
    write(tmp_path, run.model, run.optimizer, writes=True)
    held = load_file(tmp_path / "model.safetensors")
    names = {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert trained(run.model).keys() == names
    parts = ("weight", "exp_avg", "exp_avg_sq")
    assert held.keys() == {f"{part}.{name}" for part in parts for name in names}
    assert torch.equal(held["weight.0.weight"], run.model[0].weight)
    # After one step from nothing: m = (1 − β₁) g and v = (1 − β₂) g².
    moments = held["exp_avg.0.bias"] / 0.1, held["exp_avg_sq.0.bias"] / 0.001
    torch.testing.assert_close(moments[0] ** 2, moments[1])


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    run = Run()
    with pytest.raises(RunError, match="not a checkpoint of this training"):
        read_weights(tmp_path, run.model)
    run.go(0, 1)
    write(tmp_path, run.model, run.optimizer, writes=True)
    assert holds(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file(held | {"weight.0.bias": torch.zeros(6)}, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=r"0.bias is \(6,\)"):
        read_weights(tmp_path, run.model)
    del held["exp_avg.1.bias"]
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="exp_avg.1.bias is missing.*delete the folder"):
        read_moments(tmp_path, run.model, run.optimizer, 1)
    save_file({"0.bias": torch.zeros(5)}, tmp_path / "model.safetensors")
    assert not holds(tmp_path)


def test_a_checkpoint_cut_in_the_middle_is_not_used(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists()


# All leave once the checkpoint of a step is written.
LEAVING = """
import os
import torch.distributed as dist
import fusion.training as leaving
save = leaving.FusionTrainer._save_checkpoint
def left(self, *args):
    save(self, *args)
    if self.state.global_step == int(os.environ["LEAVE_AFTER"]):
        dist.barrier()
        os._exit(0)
leaving.FusionTrainer._save_checkpoint = left
"""


def _whole(state: Path) -> bool:
    """Whether this file is the last that a checkpoint gets, and all of it is there."""
    try:
        return state.name == "trainer_state.json" and bool(json.loads(state.read_text()))
    except (OSError, ValueError):
        return False


def test_a_run_killed_midway_ends_with_the_same_bytes(
    warm: Warm, prepared: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    made = job(prepared, out)
    (process,) = warm.start([alone(ALIKE, tmp_path / "said", [str(out / "job.json")])])
    deadline = time.monotonic() + 60
    while not any(map(_whole, out.glob("checkpoints/*/*.json"))) and psutil.pid_exists(process):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    warm.wait()
    if (out / "model.safetensors").exists():
        pytest.skip("the run was over before it could be killed")
    facts = train(made)
    assert facts["resumed_from"] >= 2
    assert (out / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    assert [row["step"] for row in rows(out)] == [row["step"] for row in rows(unbroken)]


def test_a_checkpoint_in_another_form_is_said_to_be_one_and_training_begins_again(
    prepared: dict[str, Any], unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "other"
    made = job(prepared, out, checkpoint_every=99)
    old = out / "checkpoints" / "checkpoint-2"
    old.mkdir(parents=True)
    (old / "trainer_state.json").write_text('{"global_step": 2}')
    shutil.copyfile(unbroken / "model.safetensors", old / "model.safetensors")
    assert train(made)["resumed_from"] == 0
    assert "checkpoint-2: not in the form of this version" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_any_way_to_share_a_model_goes_on_where_another_was_interrupted(
    warm: Warm,
    prepared: dict[str, Any],
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One process, then two by each way, then one again: every way writes and reads."""
    out = tmp_path / "passed on"

    save = TrainerState.save_to_json

    def left(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrainerState, "save_to_json", left)
        with pytest.raises(KeyboardInterrupt):
            train(job(prepared, out, checkpoint_every=1))
    for after, name in enumerate(("none", "zero2", "zero3_offload", "fsdp"), 2):
        shared = {"fsdp": True} if name == "fsdp" else {}
        shared = {"deepspeed": name} if name.startswith("zero") else shared
        job(prepared, out, checkpoint_every=1, **shared)
        script = LEAVING + (FSDP_ON_CPUS if name == "fsdp" else ALIKE)
        in_two_processes(warm, out, script, LEAVE_AFTER=str(after))
        assert [path.name for path in out.glob("checkpoints/*")] == [f"checkpoint-{after}"], name
    assert train(job(prepared, out))["resumed_from"] == after
    for one, other in zip(rows(unbroken), rows(out), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=2e-6)
        assert one["learning_rate"] == other["learning_rate"]
    for key, expected in weights(unbroken).items():
        torch.testing.assert_close(weights(out)[key], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("every", [1, 100])
def test_a_training_whose_folder_is_another_s_writes_nothing_there(
    prepared: dict[str, Any], tmp_path: Path, every: int
) -> None:
    def own() -> None:
        raise RunError("it is another's")

    with pytest.raises(RunError, match="another's"):
        train(job(prepared, tmp_path, checkpoint_every=every), own)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_checkpoint_counts_when_all_processes_have_written(
    prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def note(kind: type, name: str) -> None:
        was = getattr(kind, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return was(*args, **kwargs)

        monkeypatch.setattr(kind, name, noted)

    note(training.FusionTrainer, "_save_rng_state")
    note(Accelerator, "wait_for_everyone")
    note(TrainerState, "save_to_json")
    train(job(prepared, tmp_path, checkpoint_every=8))
    last = done.index("save_to_json")
    assert done[last - 2 : last] == ["_save_rng_state", "wait_for_everyone"]
