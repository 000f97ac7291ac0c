"""Training by adapters: what they change and what not, beside training of all weights."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy import sparse
from transformers import GPT2Config, GPT2LMHeadModel

from fusion import training
from fusion.corpus import pack, read_documents, write_blocks
from fusion.errors import RecipeError, RunError
from fusion.lora import adapt, adapter_weights, chosen, layers, require, write
from fusion.models import load_model, load_tokenizer, skeleton
from fusion.spec import LoRA
from fusion.training import attach_loss, train
from fusion.vocabulary import build
from tests.fusion.test_training import MACHINE
from tests.fusion.test_training import TRAIN as PLAIN

pytest.importorskip("peft")

TRAIN = PLAIN | {"learning_rate": 1e-2}
RANK = 3
# Dropout draws random numbers, so that a resumed run has to go on with those of the broken one.
ADAPTERS = {"rank": RANK, "alpha": 6.0, "dropout": 0.1, "targets": "all-linear"}


@pytest.fixture(scope="module")
def prepared(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job that fuses the tiny Gemma into the tiny Llama by adapters, 6 steps."""
    from harness.tiny import make_corpus

    root = tmp_path_factory.mktemp("job")
    target = load_tokenizer(tiny["llama"])
    blocks = pack(read_documents(make_corpus(root)), target, 64, 64 * 12, seed=1)
    write_blocks(root / "blocks.parquet", blocks)
    sparse.save_npz(root / "gemma.npz", build(load_tokenizer(tiny["gemma"]), target))
    source = {"model": str(tiny["gemma"]), "map": str(root / "gemma.npz"), "dtype": "float32"}
    fuse = {"sources": ["gemma"], "function": "min_ce", "clm_weight": 0.5, "online": True}
    return {
        "init": str(tiny["llama"]),
        "corpus": str(root / "blocks.parquet"),
        "train": TRAIN,
        "lora": ADAPTERS,
        "fuse": fuse,
        "sources": [source],
        "packing": "documents",
        "seed": 5,
    }


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains the job with parts of it replaced, in this process or in several; its folder."""

    def trained(processes: int = 1, machine: dict[str, Any] | None = None, **parts: Any) -> Path:
        out = tmp_path_factory.mktemp("trained")
        job = prepared | {"out": str(out), "machine": MACHINE | (machine or {})} | parts
        if processes == 1:
            train(job)
        else:
            from harness.launching import launch

            (out / "job.json").write_text(json.dumps(job))
            launch(out / "job.json", processes)
        return out

    return trained


@pytest.fixture(scope="module")
def unbroken(run: Run) -> Path:
    return run()


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "training.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def losses(out: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(out)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_is_written_differs_by_matrices_of_rank_r(
    unbroken: Path, prepared: dict[str, Any]
) -> None:
    base, found = weights(Path(prepared["init"])), weights(unbroken)
    adapted = {f"{name}.weight" for name in layers(skeleton(prepared["init"]))}
    assert len(adapted) == 14
    assert base.keys() == found.keys()
    for name, tensor in base.items():
        if name not in adapted:
            assert torch.equal(tensor.view(torch.int32), found[name].view(torch.int32)), name
            continue
        change = torch.linalg.svdvals(found[name].double() - tensor.double())
        assert change[0] > 1e-3, name
        # A change is rounded when it is added to a weight: 2⁻²⁴ of it an element.
        rounding = float(tensor.abs().max()) * 2**-23 * max(tensor.shape)
        assert change[RANK - 1] > 10 * rounding, name
        assert change[RANK] < rounding, name


def test_the_result_loads_as_every_other_row_and_is_tied_as_its_base(unbroken: Path) -> None:
    model = load_model(unbroken)
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    load_tokenizer(unbroken)
    left = {path.name for path in unbroken.iterdir()}
    assert not {n for n in left if "adapter" in n or n in ("checkpoints", "training_args.bin")}


def test_without_a_learning_rate_the_base_comes_out(
    run: Run, prepared: dict[str, Any], tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Its very bytes, also of a weight that is −0, which −0 + 0 is not."""
    base = load_model(tiny["llama"])
    name = next(iter(layers(base)))
    with torch.no_grad():
        base.get_submodule(name).weight[0, :3] = -0.0
    base.save_pretrained(tmp_path)
    load_tokenizer(tiny["llama"]).save_pretrained(tmp_path)
    out = run(init=str(tmp_path), train=TRAIN | {"learning_rate": 0.0}, fuse=None, sources=[])
    expected, found = weights(tmp_path), weights(out)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor.view(torch.int32), found[key].view(torch.int32)), key
    assert torch.signbit(found[f"{name}.weight"][0, :3]).all()


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_loss_is_that_of_training_all_weights(
    run: Run, prepared: dict[str, Any], fused: bool
) -> None:
    parts: dict[str, Any] = {"steps": 2} | ({} if fused else {"fuse": None, "sources": []})
    full, adapted = run(lora=None, **parts), run(**parts)
    one, two = rows(full)[0], rows(adapted)[0]
    assert {k: v for k, v in one.items() if k != "seconds"} == {
        k: v for k, v in two.items() if k != "seconds"
    }
    assert losses(full)[1] != losses(adapted)[1]


def test_the_loss_falls(run: Run) -> None:
    found = losses(run(lora=ADAPTERS | {"dropout": 0.0}, train=TRAIN | {"epochs": 2}))
    assert max(found[-3:]) < min(found[:3])


def test_an_interrupted_run_ends_with_the_same_bytes(
    prepared: dict[str, Any], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepared | {"out": str(tmp_path), "machine": MACHINE}

    def interrupted(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.TrainingLog, "on_step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(job)
    (checkpoint,) = (tmp_path / "checkpoints").glob("checkpoint-*")
    held = load_file(checkpoint / "model.safetensors")
    assert all(".lora_" in name for name in held), "the base is kept once, where it was"
    assert train(job)["resumed_from"] == 4
    assert (tmp_path / "model.safetensors").read_bytes() == (
        unbroken / "model.safetensors"
    ).read_bytes()


def test_activation_checkpointing_changes_nothing(run: Run, unbroken: Path) -> None:
    found = weights(run(machine={"gradient_checkpointing": True}))
    for name, expected in weights(unbroken).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)


def test_bfloat16_arithmetic_stays_near_float32(run: Run, unbroken: Path) -> None:
    out = run(train=TRAIN | {"dtype": "bfloat16"})
    # bfloat16 has eight bits: three digits of a loss near six.
    assert losses(out) == pytest.approx(losses(unbroken), abs=0.03)
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.float32}


@pytest.mark.parametrize(("deepspeed", "checkpointed"), [("zero2", True)])
def test_two_processes_give_the_loss_of_one(
    run: Run, deepspeed: str | None, checkpointed: bool
) -> None:
    # Processes drop other elements, so that only without dropout they are to agree.
    parts: dict[str, Any] = {"lora": ADAPTERS | {"dropout": 0.0}}
    machine = {"deepspeed": deepspeed, "gradient_checkpointing": checkpointed}
    one, two = run(**parts), run(2, machine, **parts)
    assert losses(two) == pytest.approx(losses(one), rel=2e-6)
    for name, expected in weights(one).items():
        # Adam divides by small square roots, so rounding of the summed gradients shows here.
        torch.testing.assert_close(weights(two)[name], expected, atol=2e-4, rtol=1e-3)


def test_the_base_is_not_rounded_with_what_computes(run: Run, prepared: dict[str, Any]) -> None:
    """DeepSpeed keeps a bfloat16 copy of all weights; what it trains is added to the exact ones."""
    parts = {"train": TRAIN | {"dtype": "bfloat16"}, "fuse": None, "sources": [], "steps": 2}
    out = run(2, {"deepspeed": "zero2"}, **parts)
    base, found = weights(Path(prepared["init"])), weights(out)
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    change = torch.linalg.svdvals(found[name].double() - base[name].double())
    assert change[RANK] < 1e-4 * change[0] != 0


def test_adapters_are_written_as_they_were_trained_and_not_as_they_computed(
    run: Run, prepared: dict[str, Any]
) -> None:
    """After a step of Adam |B| is its rate, which bfloat16 would make larger by a thousandth."""
    train, lora = TRAIN | {"dtype": "bfloat16"}, ADAPTERS | {"dropout": 0.0}
    out = run(2, {"deepspeed": "zero2"}, train=train, lora=lora, fuse=None, sources=[], steps=1)
    base, found = weights(Path(prepared["init"])), weights(out)
    model = adapt(load_model(prepared["init"]), LoRA.model_validate(lora), prepared["seed"])
    name = "model.layers.0.mlp.up_proj"
    begins = model.get_base_model().get_submodule(name).lora_A["default"].weight.detach()
    decayed = begins.bfloat16().double() * (1 - TRAIN["learning_rate"] * TRAIN["weight_decay"])
    change = found[f"{name}.weight"].double() - base[f"{name}.weight"].double()
    b = change @ torch.linalg.pinv(decayed) / (lora["alpha"] / lora["rank"])
    assert float(b.abs().median()) == pytest.approx(TRAIN["learning_rate"], rel=3e-4)


@pytest.fixture(scope="module")
def gpt2(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are kept transposed, on the tiny Llama's tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = load_tokenizer(tiny["llama"])
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_transposed_matrices_are_adapted_by_name(run: Run, gpt2: Path) -> None:
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["c_attn", "0.mlp.c_proj"]}
    out = run(init=str(gpt2), lora=lora, fuse=None, sources=[], steps=2)
    base, found = weights(gpt2), weights(out)
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, found[name])}
    wanted = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    wanted += ["transformer.h.0.mlp.c_proj"]
    assert {name.removeprefix("transformer.") for name in changed} == {
        f"{name}.weight".removeprefix("transformer.") for name in wanted
    }
    for name in changed:
        values = torch.linalg.svdvals(found[name].double() - base[name].double())
        assert values[2] < 1e-4 * values[0]
    model = skeleton(gpt2)
    assert list(chosen(model, LoRA.model_validate(lora))) == sorted(wanted)
    # 32 to 96, twice, and 128 to 32.
    assert adapter_weights(model, LoRA.model_validate(lora)) == 2 * (2 * (32 + 96) + 128 + 32)
    assert len(layers(model)) == 8, "the output head is none of them"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_prj"], r"variants\.x\.train\.lora\.targets: 'q_prj' names no .* llama .*\(q_proj\?\)"),
        (["q_proj", "lm_head"], "'lm_head' names no .* the output head and embeddings are never"),
        (["embed_tokens", "proj"], "'embed_tokens', 'proj' .* here q_proj, k_proj, v_proj, o_proj"),
    ],
)
def test_targets_that_name_nothing_are_told_with_those_there_are(
    tiny: dict[str, Path], targets: list[str], said: str
) -> None:
    model = skeleton(tiny["llama"])
    with pytest.raises(RecipeError, match=said):
        chosen(model, LoRA(targets=targets), "variants.x.train")


@pytest.mark.parametrize("name", ["llama", "gemma", "neox"])
def test_only_adapters_learn_and_what_is_drawn_first_does_not_matter(
    tiny: dict[str, Path], name: str
) -> None:
    drawn = []
    for draws in (0, 7):
        torch.manual_seed(draws)
        torch.rand(draws)
        model = load_model(tiny[name])
        expected = adapter_weights(model, LoRA(rank=RANK))
        wrapped = adapt(model, LoRA(rank=RANK), seed=5)
        learn = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
        assert all("lora_" in n and p.dtype == torch.float32 for n, p in learn.items())
        assert sum(p.numel() for p in learn.values()) == expected
        drawn.append(torch.cat([p.flatten() for p in learn.values()]))
    assert torch.equal(*drawn)


def test_a_loss_that_is_attached_stays_what_is_called(tiny: dict[str, Path]) -> None:
    model = load_model(tiny["llama"])
    attach_loss(model, None)
    ids = torch.arange(8)[None] + 20
    batch = {
        "input_ids": ids,
        "segments": torch.ones_like(ids),
        "position_ids": torch.arange(8)[None],
        "labels": torch.roll(ids, -1),
        "label_weights": torch.full((1, 8), 1 / 8),
        "clm_weight": 1.0,
    }
    before = model(**batch)["loss"]
    wrapped = adapt(model, LoRA(), seed=0)
    after = wrapped(**batch)["loss"]
    assert torch.equal(before, after)
    after.backward()
    assert model.get_output_embeddings().weight.grad is None


def test_without_peft_a_sentence_says_what_to_install(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion.lora.find_spec", lambda _: None)
    for needs in (require, lambda: adapt(load_model(tiny["llama"]), LoRA(), 0)):
        with pytest.raises(RunError, match=r"pip install 'kfuse\[lora\]'"):
            needs()


def test_a_change_is_added_as_the_equation_says(tiny: dict[str, Path], tmp_path: Path) -> None:
    """W′ = W + α/r · B·A, in loops."""
    model = load_model(tiny["neox"])
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = adapt(model, LoRA(rank=2, alpha=3.0, targets=["query_key_value"]), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    layer = "gpt_neox.layers.0.attention.query_key_value"
    learnt = {
        n.split(f"{layer}.")[1]: p for n, p in wrapped.named_parameters() if f"{layer}.l" in n
    }
    a, b = (learnt[f"lora_{k}.default.weight"].tolist() for k in "AB")
    write(wrapped, tiny["neox"], tmp_path)
    found = load_model(tmp_path).state_dict()[f"{layer}.weight"]
    for i, j in ((0, 0), (3, 5), (11, 2)):
        change = 3 / 2 * sum(b[i][k] * a[k][j] for k in range(2))
        assert float(found[i, j]) == pytest.approx(
            float(base[f"{layer}.weight"][i, j]) + change, abs=1e-6
        )
