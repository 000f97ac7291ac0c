"""Train one target: the transformers Trainer with our loss, and nothing else.

A training job is a JSON file; `python -m fusion.training JOB` runs it, alone or under
`accelerate launch` or `torchrun`, with a DeepSpeed config if the job names one. The targets of
fusion are read from the sources' stores and fused block by block as training asks for them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import set_seed

from fusion import restart
from fusion.corpus import Piece, drawn_order, read_blocks
from fusion.ending import end_with_torchrun
from fusion.errors import RunError
from fusion.flops import steps_of
from fusion.lora import adapt, write
from fusion.losses import IGNORED, Chunks, Targets, fused_loss
from fusion.models import (
    causal_pattern,
    hidden_states,
    load_model,
    load_tokenizer,
    quiet,
    require_fit,
    softcap,
)
from fusion.sharding import compile_nothing, deepspeed_config
from fusion.spec import Decay, Fuse, LoRA
from fusion.targets import FusedTargets
from fusion.training_log import TrainingLog


class Blocks(Dataset):
    """The corpus as training rows: tokens, pieces as segments, labels, and fused targets if any.

    together: the pieces of a block see each other, and each one's end predicts the next one's
    beginning, as in the published code (`packing: concatenate@reference`).
    step: blocks of an optimizer step. Where fewer are left for the last one, each weighs more and
    rows that weigh nothing make up the number, so that a step is the same however it is shared out.
    order: the blocks' places in the corpus as they are trained on; as packed if not given.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Piece]],
        targets: FusedTargets | None = None,
        together: bool = False,
        step: int = 1,
        order: Sequence[int] | None = None,
    ) -> None:
        self.blocks = blocks
        self.order = range(len(blocks)) if order is None else order
        self.targets = targets
        self.together = together
        self.step = step

    def __len__(self) -> int:
        return -(-len(self.blocks) // self.step) * self.step

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index >= len(self.blocks):
            return _nothing() | (self.targets.nothing() if self.targets else {})
        place = self.order[index]
        block = self.blocks[place]
        ids = np.concatenate([piece.ids for piece in block])
        runs = [len(ids)] if self.together else [len(piece.ids) for piece in block]
        last = np.zeros(len(ids), dtype=bool)
        last[np.cumsum(runs) - 1] = True
        if any(piece.messages for piece in block):
            last |= ~np.roll(np.concatenate([piece.learned for piece in block]), -1)
        row = {
            "input_ids": ids,
            "segments": np.repeat(np.arange(len(runs)) + 1, runs),
            "position_ids": np.concatenate([np.arange(run) for run in runs]),
            "labels": np.where(last, IGNORED, np.roll(ids, -1)),
            "label_weights": (~last) / max(1, (~last).sum()),
        }
        if self.targets:
            row |= self.targets.row(place, block, labelled=~last)
        held = min(self.step, len(self.blocks) - index // self.step * self.step)
        weigh = {key: row[key] * (self.step / held) for key in row if key.endswith("_weights")}
        return row | weigh


def _nothing() -> dict[str, np.ndarray]:
    """A row of one token that nothing is learned from."""
    row = {key: np.zeros(1, dtype=np.int64) for key in ("input_ids", "position_ids")}
    row |= {"segments": np.ones(1, dtype=np.int64), "labels": np.full(1, IGNORED)}
    return row | {"label_weights": np.zeros(1)}


def collate(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Rows padded to one length; each row weighs the same, whatever it holds."""
    fill = {"labels": IGNORED, "segments": -1, "target_ids": -1, "chunk_index": -1}
    batch = {}
    for key, first in rows[0].items():
        shape = np.max([row[key].shape for row in rows], axis=0)
        whole = np.full((len(rows), *shape), fill.get(key, 0), dtype=first.dtype)
        for index, row in enumerate(rows):
            whole[index][tuple(slice(0, n) for n in row[key].shape)] = row[key]
        batch[key] = torch.from_numpy(whole)
        if key.endswith("_weights"):
            batch[key] = batch[key].float() / len(rows)
    if "chunk_index" in batch:
        # The chunks of all rows become one list.
        before = torch.arange(len(rows))[:, None, None] * batch["chunk_weights"].shape[1]
        batch["chunk_index"] += before * (batch["chunk_index"] >= 0)
    return batch


def attach_loss(model: PreTrainedModel, fuse: Fuse | None) -> None:
    """Make `model(**batch)` return the combined loss, computed inside the model's own forward.

    It has to happen there: data parallelism synchronises gradients, and ZeRO-3 gathers the head's
    weights, only around calls of the modules that own them.
    """
    head = model.get_output_embeddings()
    cap = softcap(model)
    objective = fuse.objective if fuse and fuse.objective != "alm" else "kl"
    temperature = fuse.source_temperature if fuse else 1.0

    def head_forward(self: nn.Linear, hidden: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        weight = self.weight
        if self.bias is not None:
            hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
            weight = torch.cat([weight, self.bias[:, None]], dim=1)
        targets: Targets | Chunks | None = None
        if "target_ids" in batch:
            names = ("target_ids", "target_probabilities", "target_weights")
            targets = Targets(*(batch[name].flatten(0, 1) for name in names))
        elif "chunk_index" in batch:
            names = ("chunk_index", "chunk_logprobs", "chunk_weights")
            index, logprobs, weights = (batch[name].flatten(0, 1) for name in names)
            targets = Chunks(index, logprobs, weights, temperature)
        loss = fused_loss(
            hidden,
            weight,
            batch["labels"].flatten(),
            targets,
            batch["clm_weight"],
            objective=objective,
            label_weights=batch["label_weights"].flatten(),
            softcap=cap,
        )
        return {"loss": loss.total, "clm": loss.clm, "fusion": loss.fusion}

    def forward(self: PreTrainedModel, **batch: Any) -> dict[str, Tensor]:
        pattern = causal_pattern(batch["segments"], batch["segments"] > 0)
        hidden = hidden_states(self, batch["input_ids"], batch["position_ids"], pattern)
        return self.get_output_embeddings()(hidden.flatten(0, 1), batch)

    head.forward = MethodType(head_forward, head)
    model.forward = MethodType(forward, model)


class FusionTrainer(Trainer):
    """The Trainer, reading blocks in the order of `Blocks` and keeping the loss's parts.

    λ of step n of N is start + (end − start) n / N, with n from 0. Its checkpoints are those of
    `fusion.restart`, so that other processes may go on from them. own: called before one is
    written, raises if the folder is no longer this training's.
    """

    def __init__(
        self,
        *args: Any,
        fuse: Fuse | None = None,
        own: Callable[[], None] = lambda: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.own = own
        self.clm_weight = fuse.weight_at if fuse else Decay(start=1.0, end=1.0)
        self.model_accepts_loss_kwargs = False  # every block weighs the same; see `collate`
        self.parts: list[tuple[float, float, int, int]] = []

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(cast("Blocks", self.train_dataset))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labelled = inputs["label_weights"] > 0
        covered = torch.tensor(0)
        if "target_weights" in inputs:
            covered = (inputs["target_weights"] > 0).sum()
        elif "chunk_index" in inputs:
            covered = (inputs["chunk_index"] >= 0).any(-1).sum()
        start, end = self.clm_weight.start, self.clm_weight.end
        passed = self.state.global_step / max(1, self.state.max_steps)
        out = model(**inputs, clm_weight=start + (end - start) * passed)
        self.parts.append(
            (out["clm"].item(), out["fusion"].item(), int(covered), int(labelled.sum()))
        )
        return (out["loss"], out) if return_outputs else out["loss"]

    def go_on(self, checkpoint: Path | None) -> None:
        """Train, from the beginning or from a checkpoint."""
        if checkpoint:
            restart.read_weights(checkpoint, self._own_model())
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _own_model(self) -> nn.Module:
        return cast("nn.Module", self.model)

    def _own_optimizer(self) -> Any:
        shared: Any = self.deepspeed
        return shared.optimizer if self.is_deepspeed_enabled else self.optimizer

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """Nothing: the weights are there before processes share them."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        checkpoint = resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if checkpoint:
            step = self.state.global_step
            restart.read_moments(Path(checkpoint), self._own_model(), self._own_optimizer(), step)
            restart.set_schedule(self.lr_scheduler, step)
        return prepared

    def _save_checkpoint(self, *_: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        writes = self.is_world_process_zero()
        self.own()
        restart.write(folder, self._own_model(), self._own_optimizer(), writes)
        self._save_rng_state(str(folder))
        self.accelerator.wait_for_everyone()
        if writes:  # the state last: it says that the rest is whole
            self.state.save_to_json(str(folder / "trainer_state.json"))
            for older in folder.parent.glob("checkpoint-*"):
                if older != folder:
                    shutil.rmtree(older, ignore_errors=True)


def _arguments(job: dict, out: Path, world: int) -> TrainingArguments:
    train, machine = job["train"], job["machine"]
    if machine["deepspeed"] and machine["device"] == "cpu":
        compile_nothing()
    share, left = divmod(train["batch_blocks"], world)
    if left:
        raise RunError(
            f"{world} processes cannot share the {train['batch_blocks']} blocks of an optimizer "
            "step evenly; start a number of processes that divides them"
        )
    micro = max(n for n in range(1, machine["micro_batch"] + 1) if share % n == 0)
    total = job.get("steps") or steps_of(job["blocks"], train["batch_blocks"], train["epochs"])
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        num_train_epochs=train["epochs"],
        max_steps=job.get("steps") or -1,
        learning_rate=train["learning_rate"],
        lr_scheduler_type=train["schedule"],
        warmup_steps=round(train["warmup"] * total),
        adam_beta1=train["betas"][0],
        adam_beta2=train["betas"][1],
        weight_decay=train["weight_decay"],
        max_grad_norm=train["max_grad_norm"],
        bf16=train["dtype"] == "bfloat16",
        use_cpu=machine["device"] == "cpu",
        activation_checkpointing=machine["gradient_checkpointing"],
        deepspeed=deepspeed_config(machine["deepspeed"]),
        fsdp=machine.get("fsdp") or None,
        # Every adapter is used in every step; for wrapped models the Trainer would look each time.
        ddp_find_unused_parameters=False if job.get("lora") else None,
        save_strategy="steps",
        save_steps=machine["checkpoint_every"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=job["seed"],
        data_seed=job["seed"],
        full_determinism=False,
        remove_unused_columns=False,
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        log_level="error",
    )


def train(
    job: dict,
    own: Callable[[], None] = lambda: None,
    told: Callable[[int], None] = lambda step: None,
) -> dict[str, float]:
    """Run one job and leave the target in job["out"]; facts about the run are returned.

    own: called before anything is written there, raises if the folder is no longer this job's.
    told: called with each step that is done.

    Goes on from the last whole checkpoint; on one CPU process the final weights are the same bytes
    as those of an unbroken run.
    """
    quiet()
    out = Path(job["out"])
    set_seed(job["seed"])
    blocks = read_blocks(Path(job["corpus"]))
    fuse = Fuse.model_validate(job["fuse"]) if job["fuse"] else None
    # Before the arguments: once they name ZeRO-3, every model that is loaded is cut in pieces.
    targets = FusedTargets(fuse, job["sources"], job["init"], _own_device(job)) if fuse else None
    arguments = _arguments(job | {"blocks": len(blocks)}, out, _world_size())
    model = load_model(job["init"], "float32")
    highest = max((int(piece.ids.max()) for block in blocks for piece in block), default=-1)
    require_fit(model.config, highest + 1, job["init"])
    model.config.use_cache = False
    attach_loss(model, fuse)
    lora = LoRA.model_validate(job["lora"]) if job.get("lora") else None
    trained = adapt(model, lora, job["seed"]) if lora else model
    writes = arguments.process_index == 0
    checkpoint = restart.agreed(out / "checkpoints", writes)
    step = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    log = TrainingLog(out / "training.csv", step, writes, told)
    trainer = FusionTrainer(
        model=trained.train(),
        args=arguments,
        fuse=fuse,
        own=own,
        train_dataset=Blocks(
            blocks,
            targets,
            job["packing"] == "concatenate@reference",
            job["train"]["batch_blocks"],
            drawn_order(len(blocks), job["seed"]) if job.get("drawn") else None,
        ),
        data_collator=collate,
        callbacks=[log],
    )
    log.trainer = trainer  # type: ignore[attr-defined]
    trainer.remove_callback(PrinterCallback)  # the log has it all
    trainer.go_on(checkpoint)
    own()
    if not lora and trainer.is_deepspeed_enabled:
        # What it saves itself is rounded in bfloat16, and has tied weights twice.
        found = restart.exact(trainer._own_model(), trainer._own_optimizer(), writes)
        if writes:
            saved = cast("PreTrainedModel", trainer._own_model())
            saved.save_pretrained(out, state_dict=found)
            config = AutoConfig.from_pretrained(out)
            config.dtype = torch.float32  # and not as it computed
            config.save_pretrained(out)
    elif not lora:
        trainer.save_model(str(out))
    else:
        restart.unround(trainer._own_model(), trainer._own_optimizer())
        if writes:
            write(trained, job["init"], out)
    if trainer.is_world_process_zero():
        load_tokenizer(job["init"]).save_pretrained(out)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        (out / "training_args.bin").unlink(missing_ok=True)
    return {"steps": trainer.state.global_step, "resumed_from": step}


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _own_device(job: dict) -> str:
    """The device of this process, where several share a machine."""
    device = job["machine"]["device"]
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and _world_size() > 1 else device


def main() -> None:
    """Run the job file named on the command line."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_torchrun()  # which leaves its processes behind if it is killed
    train(json.loads(Path(sys.argv[1]).read_text()))
    if torch.distributed.is_initialized():
        # A process that leaves while another still saves takes the other's connection with it.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # All is written; an ordinary end is now and then aborted by threads that ZeRO-3 left.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
