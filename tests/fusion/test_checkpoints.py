"""Merging whole model folders, refusing what does not fit, and identity by content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from fusion import merging, streaming
from fusion.checkpoints import INDEX, identity, merge
from fusion.errors import RecipeError, RunError
from fusion.merging import COLLECTED, MERGE_METHODS, STATISTICS, context, needs_base, over_model

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a tiny Llama; more than one file if `shard` says how large one may be."""

    def write(name: str, seed: int, shard: str = "1GB", **changes: Any) -> Path:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))
        model.generation_config = GenerationConfig(max_new_tokens=seed + 5)
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"of": name}))
        return tmp_path / name

    return write


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_a_merged_folder_is_a_whole_model(make: Make, tmp_path: Path) -> None:
    base, one, two = (make(name, seed) for seed, name in enumerate(("base", "one", "two")))
    out = tmp_path / "deep" / "out"
    facts = merge([one, two], base, out, "task_arithmetic", {"scale": 0.5})
    zero, first, second, found = (weights(folder) for folder in (base, one, two, out))
    assert facts["tensors"] == len(found) == len(first)
    assert facts["parameters"] == sum(t.numel() for t in found.values())
    assert facts["files"] == 1
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, atol=1e-6, rtol=1e-5)
        assert not torch.equal(tensor, zero[name]) or "norm" in name
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(model.lm_head.weight, found["lm_head.weight"])
    assert model.generation_config.max_new_tokens == 5
    assert (out / "tokenizer.json").read_text() == '{"of": "base"}'
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# Those that take statistics of the models are merged in test_statistics.py.
WITHOUT = [method for method in MERGE_METHODS if method not in COLLECTED]


@pytest.mark.parametrize("method", WITHOUT)
def test_every_method_merges_folders(make: Make, tmp_path: Path, method: str) -> None:
    base = make("base", 0) if needs_base(method) else None
    one, two = make("one", 1), make("two", 2)
    merge([one, two], base, tmp_path / "out", method, {})
    zero = weights(base) if base else None
    first, second, found = weights(one), weights(two), weights(tmp_path / "out")
    known: dict[str, Any] = {"models": [identity(one), identity(two)]}
    if over_model(method, {}):
        parts = [(n, [first[n], second[n]], zero and zero[n]) for n in sorted(first)]
        known["found"] = STATISTICS[method](parts)
    for name, tensor in found.items():
        known["name"] = name
        given = {key: value for key, value in known.items() if key in context(method)}
        ground = zero[name] if zero else None
        expected = MERGE_METHODS[method]([first[name], second[name]], ground, **given)
        assert torch.equal(tensor, expected)


CUT = [(m, {}) for m in WITHOUT] + [
    ("varm", {"granularity": "layer"}),
    ("varm", {"granularity": "model"}),
    ("model_stock", {"filter_wise": True}),
]


@pytest.mark.parametrize(("method", "options"), CUT)
def test_rows_merge_as_the_whole_tensor_does(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: dict
) -> None:
    base, one, two = (make(name, seed) for seed, name in enumerate(("base", "one", "two")))
    merge([one, two], base, tmp_path / "whole", method, options)
    monkeypatch.setattr(streaming, "PIECE", 300)
    merge([one, two], base, tmp_path / "cut", method, options)
    found = weights(tmp_path / "cut")
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(found[name], tensor, atol=1e-7, rtol=0)


def test_varm_shares_weights_over_a_layer_or_the_model(make: Make, tmp_path: Path) -> None:
    base, one, two = (make(name, seed) for seed, name in enumerate(("base", "one", "two")))
    edit(two, lambda t: t.update({n: 2 * v for n, v in t.items() if ".layers.1." in n}))
    zero, first, second = weights(base), weights(one), weights(two)

    def share(names: list[str]) -> float:
        moved = [
            sum(((m[n] - zero[n]).double() ** 2).sum().item() for n in names)
            for m in (first, second)
        ]
        return moved[0] / sum(moved) if any(moved) else 0.5

    for granularity in ("layer", "model"):
        out = tmp_path / granularity
        merge([one, two], base, out, "varm", {"granularity": granularity})
        for name, tensor in weights(out).items():
            layer = ".".join(name.split(".")[:3]) + "."
            group = [n for n in zero if n.startswith(layer)] if ".layers." in name else [name]
            part = share(list(zero) if granularity == "model" else group)
            expected = part * first[name] + (1 - part) * second[name]
            torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_the_written_type_is_in_the_configuration(make: Make, tmp_path: Path) -> None:
    one, two, out = make("one", 1), make("two", 2), tmp_path / "out"
    merge([one, two], None, out, "linear", {}, dtype="bfloat16")
    first, second = weights(one), weights(two)
    for name, tensor in weights(out).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, ((first[name] + second[name]) / 2).bfloat16())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_shards_of_the_inputs_do_not_change_a_byte(make: Make, tmp_path: Path) -> None:
    whole = [make(f"w{seed}", seed) for seed in (0, 1, 2)]
    cut = [make(f"c{seed}", seed, shard="10KB") for seed in (0, 1, 2)]
    for folder, other in zip(whole, cut, strict=True):
        assert len(list(other.glob("*.safetensors"))) > 1
        shutil.copy(folder / "tokenizer.json", other / "tokenizer.json")
    merge(whole[1:], whole[0], tmp_path / "a", "sce", {})
    merge(cut[1:], cut[0], tmp_path / "b", "sce", {})
    merge(whole[:0:-1], whole[0], tmp_path / "c", "sce", {})
    told = ("README.md", "merge.yaml")  # they name the folders

    def files(out: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (tmp_path / out).iterdir() if p.name not in told}

    assert files("a") == files("b") == files("c")


def test_a_size_limit_cuts_the_result_in_shards(make: Make, tmp_path: Path) -> None:
    one, two, out = make("one", 1), make("two", 2), tmp_path / "out"
    merge([one, two], None, tmp_path / "whole", "linear", {})
    facts = merge([one, two], None, out, "linear", {}, shard_bytes=20_000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) == facts["files"] > 1
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == facts["bytes"]
    for path in shards:
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == {n for n, f in index["weight_map"].items() if f == path.name}
        assert sum(t.nbytes for t in load_file(path).values()) <= 20_000
    assert identity(out) == identity(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(out)
    # Merged again in one file, nothing of the shards is left.
    merge([one, two], None, out, "linear", {})
    assert [path.name for path in out.glob("*safetensors*")] == ["model.safetensors"]
    assert weights(out).keys() == weights(one).keys()


def test_all_mismatches_come_in_one_message_before_any_work(make: Make, tmp_path: Path) -> None:
    one = make("one", 1)
    two = make("two", 2, vocab_size=80, num_hidden_layers=3)
    three = make("three", 3, intermediate_size=64)
    with pytest.raises(RunError) as raised:
        merge([one, two, three], None, tmp_path / "out", "linear", {})
    text = str(raised.value)
    assert "lm_head.weight is (64, 32) in one but (80, 32) in two" in text
    assert "model.embed_tokens.weight is (64, 32) in one but (80, 32) in two" in text
    assert "set pad: trim (keep the rows that all have) or pad: extend" in text
    assert "model.layers.2.mlp.up_proj.weight is in two but not in one" in text
    down = "model.layers.0.mlp.down_proj.weight is (32, 48) in one but (32, 64) in three"
    assert f"{down} (and 1 more like it)" in text
    assert "merge models of one architecture" in text
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_folders_of_one_name_are_told_apart(make: Make, tmp_path: Path) -> None:
    one = make("x/model", 1)
    two = make("y/model", 2, vocab_size=80)
    with pytest.raises(RunError, match=r"64, 32\) in \S+x/model but \(80, 32\) in \S+y/model"):
        merge([one, two], None, tmp_path / "out", "linear", {})


def test_a_head_that_is_the_embedding_may_be_stored_or_not(make: Make, tmp_path: Path) -> None:
    tied, stored = (make(name, 3, tie_word_embeddings=True) for name in ("tied", "stored"))
    edit(stored, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in weights(tied)
    merge([tied, stored], None, tmp_path / "first", "linear", {})
    merge([stored, tied], None, tmp_path / "second", "linear", {})
    assert weights(tmp_path / "first").keys() == weights(tied).keys()
    assert weights(tmp_path / "second").keys() == weights(stored).keys()
    for folder in (tmp_path / "first", tmp_path / "second"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(model.lm_head.weight, weights(tied)["model.embed_tokens.weight"])


@pytest.mark.parametrize("stored", [False, True])
def test_tied_and_untied_heads_do_not_merge(make: Make, tmp_path: Path, stored: bool) -> None:
    tied, untied = make("tied", 1, tie_word_embeddings=True), make("untied", 2)
    if stored:
        edit(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    with pytest.raises(RunError, match="of its own in untied but the embedding in tied"):
        merge([tied, untied], None, tmp_path / "out", "linear", {})


def test_whole_numbers_must_be_equal(make: Make, tmp_path: Path) -> None:
    one, two = make("one", 1), make("two", 2)
    for folder in (one, two):
        edit(folder, lambda t: t.update(positions=torch.arange(7), flag=torch.tensor([True])))
    merge([one, two], None, tmp_path / "out", "linear", {}, dtype="bfloat16")
    found = weights(tmp_path / "out")
    assert torch.equal(found["positions"], torch.arange(7))
    assert found["flag"].tolist() == [True]
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for name, tensor in found.items():  # readers may need whole elements apart
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
    edit(two, lambda t: t.update(positions=torch.arange(7) + 1, flag=torch.tensor([1.0])))
    with pytest.raises(RunError) as raised:
        merge([one, two], None, tmp_path / "out", "linear", {})
    assert "positions holds I64 that differ between one and two" in str(raised.value)
    assert "flag is BOOL in one but F32 in two" in str(raised.value)
    assert "quantization" in str(raised.value)


def test_derived_tensors_of_old_checkpoints_do_not_hinder(make: Make, tmp_path: Path) -> None:
    one, two = make("one", 1), make("two", 2)
    edit(two, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    merge([one, two], None, tmp_path / "out", "linear", {})
    assert weights(tmp_path / "out").keys() == weights(one).keys()


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def scramble(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 100 + path.read_bytes()[100:])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_index(folder: Path) -> None:
    for number in (1, 2):
        shutil.copy(folder / "model.safetensors", folder / f"part-{number}.safetensors")
    remove(folder)


def bad_index(folder: Path) -> None:
    remove(folder)
    (folder / INDEX).write_text('{"weight_map": {')


def lost_shard(folder: Path) -> None:
    remove(folder)
    (folder / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


def lost_tensor(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / INDEX).write_text('{"weight_map": {"absent": "part.safetensors"}}')


DAMAGE = [
    (truncate, r"two/model\.safetensors: cannot be read.*damaged, fetch or build it again"),
    (scramble, r"two/model\.safetensors: cannot be read.*damaged"),
    (empty, r"two/model\.safetensors: cannot be read.*damaged"),
    (remove, r"two: holds 0 \.safetensors files.*save_pretrained"),
    (no_index, r"two: holds 2 \.safetensors files.*save_pretrained"),
    (bad_index, r"index\.json: cannot be read.*damaged"),
    (lost_shard, r"index\.json: lists model-00001-of-00002\.safetensors, not there"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_files_are_named(
    make: Make, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    one, two = make("one", 1), make("two", 2)
    damage(two)
    with pytest.raises(RunError, match=message):
        merge([one, two], None, tmp_path / "out", "linear", {})
    with pytest.raises(RunError, match=message):
        identity(two)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_the_index_lists_is_missed(make: Make, tmp_path: Path) -> None:
    one, two = make("one", 1), make("two", 2)
    lost_tensor(two)
    with pytest.raises(RunError, match=r"part\.safetensors: lacks absent"):
        merge([one, two], None, tmp_path / "out", "linear", {})


def test_what_a_method_refuses_is_the_recipes_fault(make: Make, tmp_path: Path) -> None:
    one, two, out = make("one", 1), make("two", 2), tmp_path / "out"
    for method, options, message in (
        ("linear", {"weights": [1, 2, 3]}, "linear: 3 weights for 2 models"),
        ("linear", {"weigths": [1, 2]}, "linear: .*weigths"),
        ("linear", {"weights": "ab"}, "linear: "),
        ("varm", {}, "varm works on changes against a base"),
        ("lerp", {}, "'lerp' is unknown; known: linear, slerp"),
    ):
        with pytest.raises(RecipeError, match=message):
            merge([one, two], None, out, method, options)
    with pytest.raises(RunError, match="one of the models to merge"):
        merge([one, two], None, one, "linear", {})
    assert not out.exists()


def test_what_breaks_off_leaves_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, out = make("one", 1), make("two", 2), tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00009.safetensors").touch()
    calls = []

    def breaks(tensors: Any, base: torch.Tensor | None) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return tensors[0]

    monkeypatch.setitem(merging.MERGE_METHODS, "breaks", breaks)
    with pytest.raises(KeyboardInterrupt):
        merge([one, two], None, out, "breaks", {})
    assert [path.name for path in out.iterdir()] == ["kept"]
    assert not (tmp_path / ".out.partial").exists()


def test_identity_is_of_the_content(make: Make, tmp_path: Path) -> None:
    whole, cut = make("whole", 1), make("cut", 1, shard="10KB")
    shutil.copy(whole / "tokenizer.json", cut / "tokenizer.json")
    assert identity(whole) == identity(cut)
    assert len(identity(whole)) == 64
    (whole / "manifest.json").write_text("{}")
    assert identity(whole) == identity(cut)
    seen = {identity(whole)}
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        before = (whole / name).read_bytes()
        (whole / name).write_bytes(before + b"\n")
        seen.add(identity(whole))
        (whole / name).write_bytes(before)
    edit(whole, lambda t: t.update(extra=torch.zeros(1)))
    seen.add(identity(whole))
    edit(whole, lambda t: t.update(extra=torch.zeros(1, 1)))
    seen.add(identity(whole))
    edit(whole, lambda t: t.update(extra=torch.zeros(1, 1, dtype=torch.int32)))
    seen.add(identity(whole))
    assert len(seen) == 7


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_changed_byte_of_a_weight_changes_the_identity(make: Make, place: float) -> None:
    folder = make("one", 1)
    path = folder / "model.safetensors"
    before, content = identity(folder), bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int(place * (len(content) - 1 - start))] ^= 1
    path.write_bytes(content)
    assert identity(folder) != before
