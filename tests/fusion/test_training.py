"""Training on tiny models: kill and resume, several processes, λ, and what the log says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from transformers import AutoConfig

from fusion.corpus import drawn_order, read_blocks, write_blocks
from fusion.errors import RunError
from fusion.losses import IGNORED
from fusion.models import load_model, load_tokenizer
from fusion.spec import Fuse
from fusion.targets import FusedTargets
from fusion.training import Blocks, train
from fusion.vocabulary import build
from tests.fusion.jobs import ALIKE, FSDP_ON_CPUS, TRAIN, in_two_processes, job, rows, weights
from tests.warm import Warm


def test_both_parts_of_the_loss_fall_and_are_logged(unbroken: Path) -> None:
    log = rows(unbroken)
    assert [int(row["step"]) for row in log] == list(range(1, 9))
    assert float(log[-1]["clm"]) < float(log[0]["clm"])
    for row in log:
        total = 0.5 * float(row["clm"]) + 0.5 * float(row["fusion"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-4)
        assert 0.5 < float(row["coverage"]) <= 1
    assert not (unbroken / "checkpoints").exists()
    load_model(unbroken)


def test_rows_that_train_together_give_the_loss_of_rows_alone(
    prepared: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    train(job(prepared, tmp_path / "two", micro_batch=2))
    for one, two in zip(rows(unbroken), rows(tmp_path / "two"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-5)


@pytest.mark.parametrize("objective", ["kl", "alm"])
def test_a_last_step_of_fewer_blocks_is_their_mean_however_they_are_shared_out(
    prepared: dict[str, Any], tmp_path: Path, objective: str
) -> None:
    """16 blocks, six a step: of the last step's four each counts a quarter, in rows of one to four.

    Rows of four: six is no multiple, so three are taken.
    """
    logs = []
    for micro in (1, 2, 4):
        made = job(prepared, tmp_path / str(micro), micro_batch=micro)
        made |= {"fuse": made["fuse"] | {"objective": objective}}
        train(made | {"train": TRAIN | {"batch_blocks": 6, "learning_rate": 1e-9}})
        logs.append(rows(tmp_path / str(micro)))
    alone = job(prepared, tmp_path / "alone") | {"fuse": made["fuse"]}
    train(alone | {"train": TRAIN | {"batch_blocks": 1, "learning_rate": 1e-9}})
    each = [float(row["loss"]) for row in rows(tmp_path / "alone")]
    for log in logs:
        assert [int(row["step"]) for row in log] == [1, 2, 3]
        for row, blocks in zip(log, (each[:6], each[6:12], each[12:]), strict=True):
            assert float(row["loss"]) == pytest.approx(sum(blocks) / len(blocks), rel=1e-5)
        assert [row["tokens"] for row in log] == [row["tokens"] for row in logs[0]]
        assert [row["coverage"] for row in log] == [row["coverage"] for row in logs[0]]


def test_a_step_without_anything_to_learn_is_passed(
    prepared: dict[str, Any], tmp_path: Path
) -> None:
    """As of a conversation whose answers do not fit into its block."""
    blocks = list(read_blocks(Path(prepared["corpus"])))[:3]
    piece = blocks[0][0]
    blocks[0] = [replace(piece, ids=piece.ids[:1], ends=piece.ends[:1])]
    write_blocks(tmp_path / "blocks.parquet", blocks)
    made = job(prepared, tmp_path / "clm") | {"fuse": None, "sources": []}
    train_ = TRAIN | {"batch_blocks": 1}
    train(made | {"corpus": str(tmp_path / "blocks.parquet"), "train": train_})
    log = rows(tmp_path / "clm")
    assert [float(row["loss"]) > 0 for row in log] == [False, True, True]
    assert log[0]["tokens"] == "0"


def test_processes_that_cannot_share_a_step_evenly_are_refused(
    prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RunError, match="3 processes cannot share the 2 blocks of an optimizer"):
        train(job(prepared, tmp_path / "three"))


def test_activation_checkpointing_changes_nothing(
    prepared: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    train(job(prepared, tmp_path / "less", gradient_checkpointing=True))
    for name, expected in weights(unbroken).items():
        torch.testing.assert_close(weights(tmp_path / "less")[name], expected, atol=1e-6, rtol=1e-5)


def test_bfloat16_arithmetic_stays_near_float32(
    prepared: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    made = job(prepared, tmp_path / "half")
    train(made | {"train": TRAIN | {"dtype": "bfloat16"}})
    for one, two in zip(rows(unbroken), rows(tmp_path / "half"), strict=True):
        # bfloat16 has eight bits: three digits of a loss near six.
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), abs=0.03)
    assert weights(tmp_path / "half")["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_weights_are_saved_as_they_were_trained_and_not_as_they_computed(
    warm: Warm, prepared: dict[str, Any], tmp_path: Path, deepspeed: str
) -> None:
    """After a step of Adam a weight has moved by the rate, which bfloat16 would round away."""
    rate = 1e-4
    made = job(prepared, tmp_path / "two", deepspeed=deepspeed) | {"fuse": None, "sources": []}
    made |= {"steps": 1}
    made["train"] = TRAIN | {"dtype": "bfloat16", "learning_rate": rate, "weight_decay": 0.0}
    (tmp_path / "two" / "job.json").write_text(json.dumps(made))
    in_two_processes(warm, tmp_path / "two", ALIKE)
    before, after = weights(Path(prepared["init"])), weights(tmp_path / "two")
    assert after.keys() == before.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (after[name] - before[name].bfloat16().float()).abs()
    assert float(moved.median()) == pytest.approx(rate, rel=1e-2)
    assert AutoConfig.from_pretrained(tmp_path / "two").dtype == torch.float32


def test_packing_says_whether_documents_see_each_other(prepared: dict[str, Any]) -> None:
    blocks = read_blocks(Path(prepared["corpus"]))
    block = [*blocks[0], *blocks[1]]
    first = len(block[0].ids)
    apart, together = Blocks([block])[0], Blocks([block], together=True)[0]
    assert (apart["input_ids"] == together["input_ids"]).all()
    assert apart["segments"][first] == 2
    assert apart["position_ids"][first] == 0
    assert apart["labels"][first - 1] == IGNORED
    assert (together["segments"] == 1).all()
    assert (np.diff(together["position_ids"]) == 1).all()
    assert together["labels"][first - 1] == block[1].ids[0]
    assert together["labels"][-1] == IGNORED


def test_a_seed_of_its_own_draws_an_order_in_which_blocks_keep_their_targets(
    prepared: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    blocks = read_blocks(Path(prepared["corpus"]))
    order = drawn_order(len(blocks), 5)
    assert sorted(order) == list(range(len(blocks)))
    assert order != sorted(order)
    assert order != drawn_order(len(blocks), 6)
    fuse = Fuse.model_validate(prepared["fuse"])
    targets = FusedTargets(fuse, prepared["sources"], prepared["init"], "cpu")
    packed, drawn = Blocks(blocks, targets), Blocks(blocks, targets, order=order)
    for index, place in enumerate(order):
        for key, value in packed[place].items():
            np.testing.assert_array_equal(drawn[index][key], value)
    train(job(prepared, tmp_path / "drawn") | {"drawn": True})
    once, again = weights(unbroken), weights(tmp_path / "drawn")
    assert any((once[name] != again[name]).any() for name in once)


def changed(prepared: dict[str, Any], out: Path, **fuse: Any) -> list[dict[str, str]]:
    """The log of the job with a part of its fusion replaced."""
    made = job(prepared, out)
    train(made | {"fuse": made["fuse"] | fuse})
    return rows(out)


def test_sources_run_while_training_give_the_numbers_of_their_stores(
    prepared: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "online"
    made = job(prepared, out)
    sources = [{k: v for k, v in s.items() if k != "store"} for s in made["sources"]]
    train(made | {"fuse": made["fuse"] | {"online": True}, "sources": sources})
    assert (out / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_lambda_goes_from_start_towards_end(prepared: dict[str, Any], tmp_path: Path) -> None:
    for number, row in enumerate(
        changed(prepared, tmp_path / "decay", clm_weight={"start": 0.2, "end": 1.0})
    ):
        # 16 blocks, two a step: eight steps.
        weight = 0.2 + 0.8 * number / 8
        total = weight * float(row["clm"]) + (1 - weight) * float(row["fusion"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("objective", ["reverse_kl", "jsd", "total_variation", "alm"])
def test_every_objective_falls(prepared: dict[str, Any], tmp_path: Path, objective: str) -> None:
    made = job(prepared, tmp_path / objective, micro_batch=2)
    fuse = made["fuse"] | {"objective": objective, "clm_weight": 0.0, "sources": ["gemma"]}
    train(made | {"fuse": fuse, "sources": made["sources"][1:], "train": TRAIN | {"epochs": 3}})
    log = [float(row["fusion"]) for row in rows(tmp_path / objective)]
    assert sum(log[-4:]) < 0.9 * sum(log[:4])
    assert all(0.5 < float(row["coverage"]) <= 1 for row in rows(tmp_path / objective))


def test_chunks_of_rows_that_train_together_stay_apart(
    prepared: dict[str, Any], tmp_path: Path
) -> None:
    logs = []
    for micro in (1, 2):
        made = job(prepared, tmp_path / str(micro), micro_batch=micro)
        train(made | {"fuse": made["fuse"] | {"objective": "alm"}})
        logs.append([float(row["loss"]) for row in rows(tmp_path / str(micro))])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_the_published_codes_fusion_trains(
    prepared: dict[str, Any], tiny: dict[str, Path], tmp_path: Path
) -> None:
    made = job(prepared, tmp_path / "faults")
    target = load_tokenizer(tiny["llama"])
    sources = []
    for source in made["sources"]:
        found = build(load_tokenizer(source["model"]), target, "min_ed@reference")
        sources.append(source | {"map": str(tmp_path / (Path(source["model"]).name + ".npz"))})
        sparse.save_npz(sources[-1]["map"], found)
    # The stores hold eight entries a position; the published code's ten change nothing here.
    fuse = {"sources": ["llama", "gemma"], "fidelity": "reference", "clm_weight": 0.5, "top_k": 8}
    train(made | {"fuse": fuse, "sources": sources, "packing": "concatenate@reference"})
    log = rows(tmp_path / "faults")
    assert float(log[-1]["fusion"]) < float(log[0]["fusion"])
    assert all(float(row["coverage"]) == 1 for row in log)  # one-hot wherever nothing aligns


# Each process says which block of which store it reads.
READING = """
import os
import fusion.distributions as distributions
read = distributions.Store.read
def told(self, block, pieces=None):
    os.write(1, f"read {os.environ['RANK']} {self.path.name} {block}\\n".encode())
    return read(self, block, pieces)
distributions.Store.read = told
"""


def test_two_that_share_a_model_by_fsdp_read_their_own_and_give_the_loss_of_one(
    warm: Warm, prepared: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    job(prepared, tmp_path / "two", fsdp=True)
    said = in_two_processes(warm, tmp_path / "two", READING + FSDP_ON_CPUS)
    read = re.findall(r"read (\d) (\w+) (\d+)\n", said)
    own = [(str(b % 2), source, str(b)) for b in range(16) for source in ("gemma", "llama")]
    assert sorted(read) == sorted(own)  # its own rows' distributions, once, and no others'
    assert said.count("in pieces: True") == 2
    for one, two in zip(rows(unbroken), rows(tmp_path / "two"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=2e-6)
    for key, expected in weights(unbroken).items():
        torch.testing.assert_close(weights(tmp_path / "two")[key], expected, atol=2e-4, rtol=1e-3)


def test_two_processes_by_a_file_give_the_loss_of_one(
    prepared: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    from harness.launching import launch

    content = {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # The recipe decides on optimizer and schedule; these must have no effect.
        "optimizer": {"type": "AdamW", "params": {"lr": 1.0, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}},
    }
    config = tmp_path / "zero.json"
    config.write_text(json.dumps(content))
    out = tmp_path / "two"
    job(prepared, out, deepspeed=str(config))
    launch(out / "job.json", 2)
    assert "built successfully" not in (out / "training.log").read_text()
    for one, two in zip(rows(unbroken), rows(out), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=2e-6)
        assert (one["learning_rate"], one["tokens"]) == (two["learning_rate"], two["tokens"])
        assert float(one["clm"]) == pytest.approx(float(two["clm"]), rel=2e-6)
        assert one["coverage"] == two["coverage"]
    assert weights(out).keys() == weights(unbroken).keys()
    for name, expected in weights(unbroken).items():
        # Adam divides by small square roots, so rounding of the summed gradients shows here.
        torch.testing.assert_close(weights(out)[name], expected, atol=2e-4, rtol=1e-3)
