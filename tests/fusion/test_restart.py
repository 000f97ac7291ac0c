"""Checkpoints that any way goes on from: what they hold, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import get_cosine_schedule_with_warmup

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
