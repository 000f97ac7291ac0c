"""Statistics of models on a corpus: against gradients and inputs by hand, and as files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion.checkpoints import merge
from fusion.corpus import Piece, pack
from fusion.errors import RunError
from fusion.informed import fisher, regmean
from fusion.models import load_model, load_tokenizer
from fusion.statistics import FILE, Statistics, collect
from harness.tiny import TEXT

Made = Callable[..., tuple[Path, dict[str, Any]]]


def blocks_of(folder: Path, count: int = 2) -> list[list[Piece]]:
    documents = [("village", text) for text in TEXT[:20]]
    return pack(documents, load_tokenizer(folder), 48, 48 * count, 1)


@pytest.fixture(scope="module")
def made(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(folder, facts) of one model's statistics, each collected once."""
    known: dict[Any, tuple[Path, dict[str, Any]]] = {}

    def give(name: str, kind: str, **options: Any) -> tuple[Path, dict[str, Any]]:
        key = (name, kind, *sorted(options.items()))
        if key not in known:
            out = tmp_path_factory.mktemp("statistics")
            folder = tiny[name]
            model, tokenizer = load_model(folder), load_tokenizer(folder)
            facts = collect(kind, model, tokenizer, blocks_of(tiny["llama"]), out, **options)
            assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
            known[key] = out, facts
        return known[key]

    return give


@pytest.mark.parametrize("name", ["llama", "gemma", "neox"])
def test_fisher_is_the_squared_gradient_of_each_sequence(
    name: str, tiny: dict[str, Path], made: Made
) -> None:
    """By the model's own forward pass, a sequence at a time, in float64."""
    folder, facts = made(name, "fisher")
    model, tokenizer = load_model(tiny[name]).double(), load_tokenizer(tiny[name])
    named = dict(model.named_parameters())
    sums = {key: torch.zeros_like(p) for key, p in named.items()}
    tokens = 0
    blocks = blocks_of(tiny["llama"])
    for piece in (piece for block in blocks for piece in block):
        end = [tokenizer.eos_token_id] if piece.ends_document else []
        ids = torch.tensor([[*tokenizer(piece.text).input_ids, *end]])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = sum(logprobs[t, ids[0, t + 1]] for t in range(ids.shape[1] - 1))
        for key, grad in zip(named, torch.autograd.grad(chosen, named.values()), strict=True):
            sums[key] += grad**2
        tokens += ids.shape[1] - 1
    assert facts["sequences"] == sum(len(block) for block in blocks) > len(blocks)
    assert facts["tokens"] == tokens
    found = load_file(folder / FILE)
    assert found.keys() == sums.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor.double(), sums[key] / tokens, rtol=2e-3, atol=1e-9)
    assert facts["mean"] == pytest.approx(
        sum(float(t.double().sum()) for t in found.values()) / facts["numbers"]
    )


def test_drawn_labels_are_the_models_own(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draw is from the model's prediction, and what is drawn is what is derived."""
    model, tokenizer = load_model(tiny["llama"]), load_tokenizer(tiny["llama"])
    piece = blocks_of(tiny["llama"], 1)[0][0]
    ids = torch.tensor(piece.ids)
    drawn = torch.arange(len(ids) - 1)[:, None]
    asked: list[Tensor] = []

    def draw(chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
        asked.append(chances)
        return drawn

    monkeypatch.setattr(torch, "multinomial", draw)
    collect("fisher", model, tokenizer, [[piece]], tmp_path, labels="model")
    logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(asked[0], logprobs.exp())
    weight = model.model.norm.weight
    (grad,) = torch.autograd.grad(logprobs.gather(1, drawn).sum(), weight)
    found = load_file(tmp_path / FILE)["model.norm.weight"]
    torch.testing.assert_close(found, grad**2 / len(drawn), rtol=1e-3, atol=1e-6)


def test_labels_and_seeds_count_and_nothing_else_does(made: Made, tiny: dict[str, Path]) -> None:
    data, model = made("llama", "fisher")[0], made("llama", "fisher", labels="model", seed=1)[0]
    other = made("llama", "fisher", labels="model", seed=2)[0]
    assert len({(folder / FILE).read_bytes() for folder in (data, model, other)}) == 3
    again = data.with_name("again")
    again.mkdir()
    arguments = load_model(tiny["llama"]), load_tokenizer(tiny["llama"]), blocks_of(tiny["llama"])
    collect("fisher", *arguments, again)
    assert (again / FILE).read_bytes() == (data / FILE).read_bytes()


def test_grams_are_of_the_inputs_of_every_linear_layer(made: Made, tiny: dict[str, Path]) -> None:
    folder, facts = made("llama", "gram")
    model = load_model(tiny["llama"])
    seen: dict[str, list[Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(
                lambda _, given, out, name=name: seen.setdefault(name, []).append(given[0][0])
            )
    tokens = 0
    for block in blocks_of(tiny["llama"]):
        for piece in block:
            model(torch.tensor(piece.ids)[None])
            tokens += len(piece.ids)
    del seen["lm_head"]  # it is the embedding here
    assert facts["tokens"] == tokens
    with ExitStack() as stack:
        statistics = Statistics(folder, stack)
        assert len(seen) == 14
        assert len(statistics.names) == 8  # q, k and v read the same, as do gate and up
        for name, inputs in seen.items():
            x = torch.cat(inputs).double()
            found = statistics.read(f"{name}.weight").double()
            torch.testing.assert_close(found, x.T @ x, rtol=1e-4, atol=1e-4)
        assert "lm_head.weight" not in statistics
        assert "model.embed_tokens.weight" not in statistics


def test_a_head_of_its_own_is_a_linear_layer(made: Made) -> None:
    with ExitStack() as stack:
        statistics = Statistics(made("neox", "gram")[0], stack)
        assert statistics.shape("lm_head.weight") == (32, 32)
        assert "gpt_neox.layers.0.attention.dense.weight" in statistics
        assert not any("embed_in" in name or "bias" in name for name in statistics.names)


@pytest.fixture(scope="module")
def pair(tiny: dict[str, Path], made: Made, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny llama and a model near it."""
    other = tmp_path_factory.mktemp("pair") / "other"
    shutil.copytree(tiny["llama"], other)
    weights = load_file(other / "model.safetensors")
    g = torch.Generator().manual_seed(5)
    moved = {k: v + 0.01 * torch.randn(v.shape, generator=g) for k, v in weights.items()}
    save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
    return [tiny["llama"], other]


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_merged_folders_hold_what_the_formulas_give(
    method: str, pair: list[Path], made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"fisher": "fisher", "regmean": "gram"}[method]
    folders = []
    for number, path in enumerate(pair):
        folders.append(tmp_path / f"s{number}")
        folders[-1].mkdir()
        arguments = load_model(path), load_tokenizer(path), blocks_of(pair[0])
        collect(kind, *arguments, folders[-1])
    monkeypatch.setattr("fusion.streaming.PIECE", 1000)  # several pieces a tensor
    merge(pair, None, tmp_path / "out", method, {}, statistics=folders)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert load_model(tmp_path / "out")(torch.tensor([[5, 6]])).logits.isfinite().all()
    one, two = (load_file(path / "model.safetensors") for path in pair)
    with ExitStack() as stack:
        held = [Statistics(folder, stack) for folder in folders]
        unit = (held[0].mean + held[1].mean) / 2
        for name, tensor in found.items():
            given = None
            if name in held[0]:
                given = [h.read(name) / unit for h in held]
            function = fisher if method == "fisher" else regmean
            expected = function([one[name], two[name]], None, statistics=given)
            # Not to the bit: of two models, the first in a piece is another than in the whole.
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8)
            differs = not torch.allclose(tensor, (one[name] + two[name]) / 2, rtol=0, atol=1e-5)
            assert differs == (name in held[0])
    # Neither the order of the models, nor threads, nor the layout of files changes a byte.
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        merge(
            pair[::-1], None, tmp_path / "b", method, {}, statistics=folders[::-1],
            shard_bytes=50_000,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    shards = sorted((tmp_path / "b").glob("model-*.safetensors"))
    assert len(shards) > 1
    parts = {k: v for shard in shards for k, v in load_file(shard).items()}
    assert all(torch.equal(parts[k], v) for k, v in found.items())


def test_an_extended_embedding_has_rows_that_no_text_reached(
    pair: list[Path], made: Made, tmp_path: Path
) -> None:
    folder, _ = made("llama", "fisher")
    with ExitStack() as stack:
        statistics = Statistics(folder, stack)
        rows = statistics.shape("model.embed_tokens.weight")[0]
        whole = statistics.read("model.embed_tokens.weight", rows - 2, rows + 3)
        assert whole.shape == (5, 48)
        assert (whole[2:] == 0).all()
        assert "lm_head.weight" in statistics  # tied: what is known of the embedding
        assert statistics.read("lm_head.weight").equal(statistics.read("model.embed_tokens.weight"))


def test_wrong_and_damaged_statistics_are_told(
    pair: list[Path], made: Made, tmp_path: Path
) -> None:
    good, gram = made("llama", "fisher")[0], made("llama", "gram")[0]

    def refused(method: str, *folders: Path) -> str:
        with pytest.raises(RunError) as error:
            merge(pair, None, tmp_path / "out", method, {}, statistics=folders)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "2 folders of `statistics.collect`, not 0" in refused("fisher")
    assert "holds gram, but fisher takes fisher" in refused("fisher", good, gram)
    assert "which is not in" in refused("fisher", good, made("neox", "fisher")[0])
    assert "which is not in" in refused("regmean", gram, made("gemma", "gram")[0])
    assert "delete" in refused("fisher", good, tmp_path / "absent")
    cut = tmp_path / "cut"
    cut.mkdir()
    content = (good / FILE).read_bytes()
    for wrong in (content[:-9], content[:20], b""):
        (cut / FILE).write_bytes(wrong)
        assert str(cut / FILE) in refused("fisher", good, cut)
    shutil.copyfile(pair[0] / "model.safetensors", cut / FILE)
    assert "cannot be read as statistics" in refused("fisher", good, cut)


def test_a_broken_model_and_an_unknown_kind_are_refused(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = load_model(tiny["llama"]), load_tokenizer(tiny["llama"])
    blocks = blocks_of(tiny["llama"], 1)
    with pytest.raises(ValueError, match="no statistics 'hessian'"):
        collect("hessian", model, tokenizer, blocks, tmp_path)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        collect("fisher", model, tokenizer, blocks, tmp_path)
    assert not list(tmp_path.iterdir())
