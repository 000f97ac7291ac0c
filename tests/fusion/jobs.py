"""Training jobs of tests: written, run alone or in several processes, and read again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.warm import Warm, ranks

ALIKE = "from fusion.training import main; main()"
TRAIN = {
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "warmup": 0.1,
    "batch_blocks": 2,
    "epochs": 1,
    "betas": [0.9, 0.95],
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "dtype": "float32",
}
MACHINE = {
    "device": "cpu",
    "micro_batch": 1,
    "gradient_checkpointing": False,
    "checkpoint_every": 2,
    "deepspeed": None,
}

# accelerate shards by FSDP on accelerators only; told that these are some, it does on CPUs, too.
FSDP_ON_CPUS = """
import os
import accelerate.state as state
from torch.distributed.tensor import DTensor
import fusion.training as training
begin, loss = state.PartialState.__init__, training.FusionTrainer.compute_loss
def told(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if self.distributed_type == state.DistributedType.MULTI_CPU:
        self.distributed_type = state.DistributedType.MULTI_GPU
def spoken(self, model, *args, **kwargs):
    if self.state.global_step == 0:
        pieces = all(isinstance(p, DTensor) for p in model.parameters())
        os.write(1, f"in pieces: {pieces}\\n".encode())
    return loss(self, model, *args, **kwargs)
state.PartialState.__init__, training.FusionTrainer.compute_loss = told, spoken
training.main()
"""


def job(prepared: dict[str, Any], out: Path, **machine: Any) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    made = prepared | {"out": str(out), "machine": MACHINE | machine}
    (out / "job.json").write_text(json.dumps(made))
    return made


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "training.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def in_two_processes(warm: Warm, out: Path, script: str, **environment: str) -> str:
    """Run a script on the job in a folder in two processes; what they printed."""
    said = out / "said"
    said.unlink(missing_ok=True)
    warm.start(ranks(script, said, [str(out / "job.json")], 2, **environment))
    assert warm.wait() == [0, 0], said.read_text()[-9000:]
    return said.read_text()
