"""The log of a training: a line a step, on disk as soon as it is known."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

LOG_COLUMNS = ("step", "tokens", "seconds", "loss", "clm", "fusion", "coverage", "learning_rate")


class TrainingLog(TrainerCallback):
    """Appends a line a step to `training.csv`; a resumed run cuts it back to its checkpoint.

    Of several processes one `writes`. told: called with each step that is written.
    """

    def __init__(
        self,
        path: Path,
        resumed_step: int,
        writes: bool = True,
        told: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.path, self.told = path, told
        self.started = time.monotonic()
        rows = []
        self.seconds, self.tokens = 0.0, 0
        if not writes:
            return
        if path.exists() and resumed_step:
            with path.open(newline="") as lines:
                rows = [r for r in csv.DictReader(lines) if int(r["step"]) <= resumed_step]
        if rows:
            self.seconds, self.tokens = float(rows[-1]["seconds"]), int(rows[-1]["tokens"])
        with path.open("w", newline="") as out:
            writer = csv.DictWriter(out, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any
    ) -> None:
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        if not logs or "learning_rate" not in logs or not trainer.parts:
            return
        parts = torch.tensor(trainer.parts, dtype=torch.float64, device=args.device)
        trainer.parts.clear()
        whole = trainer.accelerator.reduce(parts.sum(dim=0)).tolist()
        if not state.is_world_process_zero:
            return
        clm, fusion = (part / (len(parts) * args.world_size) for part in whole[:2])
        coverage = whole[2] / max(1.0, whole[3])  # a step of what is only read learns nothing
        self.tokens += int(whole[3])
        seconds = self.seconds + time.monotonic() - self.started
        row = (state.global_step, self.tokens, round(seconds, 3), logs["loss"], clm, fusion)
        with self.path.open("a", newline="") as out:
            csv.writer(out).writerow([*row, coverage, logs["learning_rate"]])
        self.told(state.global_step)
