"""Unequal vocabularies, tokenizers, types, chat templates; what a merge says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fusion.checkpoints import merge
from fusion.errors import RunError

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a tiny Llama of some number of rows, and a tokenizer of some tokens."""

    def write(name: str, seed: int, rows: int, tokens: list[str], **changes: Any) -> Path:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "vocab_size": rows}
        config = LlamaConfig(**(sizes | changes))
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        vocabulary = {token: place for place, token in enumerate(tokens)}
        content = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []})
        (tmp_path / name / "tokenizer.json").write_text(content)
        return tmp_path / name

    return write


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("pad", "rows"), [("trim", 6), ("extend", 9)])
def test_unequal_embeddings_are_made_equal_as_told(
    make: Make, tmp_path: Path, pad: str, rows: int, tied: bool
) -> None:
    base = make("base", 0, 6, ["a", "b"], tie_word_embeddings=tied)
    one = make("one", 1, 9, ["a", "b"], tie_word_embeddings=tied)
    two = make("two", 2, 8, ["a", "b", "c"], tie_word_embeddings=tied)
    out = tmp_path / "out"
    with pytest.raises(RunError, match="set pad: trim"):
        merge([one, two], base, out, "linear", {})
    merge([one, two], base, out, "linear", {}, pad=pad)
    key = "model.embed_tokens.weight"
    first, second, found = (weights(folder)[key] for folder in (one, two, out))
    assert found.shape[0] == rows == json.loads((out / "config.json").read_text())["vocab_size"]
    torch.testing.assert_close(found[:6], (first[:6] + second[:6]) / 2)
    if pad == "extend":
        torch.testing.assert_close(found[6:8], (first[6:8] + second[6:8]) / 2)
        # The second model lacks the last row and takes the first's, so it stays that.
        torch.testing.assert_close(found[8], first[8])
    _, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading


def test_trimming_does_not_cut_tokens_off(make: Make, tmp_path: Path) -> None:
    one, two = make("one", 1, 9, list("abcdefgh")), make("two", 2, 6, ["a"])
    with pytest.raises(RunError, match="cut to 6 rows, but the tokenizer of one uses 8; set pad"):
        merge([one, two], None, tmp_path / "out", "linear", {}, pad="trim")
    assert not (tmp_path / "out").exists()


def test_tokens_of_another_id_are_refused_with_all_else(make: Make, tmp_path: Path) -> None:
    one, two = make("one", 1, 6, ["a", "b", "c"]), make("two", 2, 7, ["a", "c", "b"])
    with pytest.raises(RunError) as raised:
        merge([one, two], None, tmp_path / "out", "linear", {})
    text = str(raised.value)
    assert "tokenizer.json: 'b' is 1 in one but 2 in two (and 1 more tokens)" in text
    assert "lm_head.weight is (6, 16) in one but (7, 16) in two" in text
    (two / "tokenizer.json").write_text("{")
    with pytest.raises(RunError, match=r"two/tokenizer\.json: is not JSON"):
        merge([one, two], None, tmp_path / "out", "linear", {})


def test_a_merged_folder_says_what_it_is(make: Make, tmp_path: Path) -> None:
    one, two = make("one", 1, 6, ["a"]), make("two", 2, 6, ["a"])
    (two / "chat_template.jinja").write_text("{{ x }}")
    model = AutoModelForCausalLM.from_pretrained(two, dtype=torch.bfloat16)
    model.save_pretrained(two)
    out = tmp_path / "out"
    facts = merge([one, two], one, out, "dare_linear", {"seed": 3}, rows=["first", "second"])
    assert facts["notes"] == [
        "stored type: F32 in one, BF16 in two; merged in float32",
        "chat template: that of one is kept; two is another",
    ]
    section = yaml.safe_load((out / "merge.yaml").read_text())["merge"]
    assert section["inputs"] == ["first", "second"]
    assert section["parameters"] == {"seed": 3}
    card = (out / "README.md").read_text()
    assert "dare_linear merge of first, second" in card
    assert facts["notes"][1] in card


def test_a_configuration_that_gives_equal_shapes_another_meaning_is_refused(
    make: Make, tmp_path: Path
) -> None:
    one, two = make("one", 1, 6, ["a"]), make("two", 2, 6, ["a"])
    path = two / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"max_position_embeddings": 99}))
    facts = merge([one, two], None, tmp_path / "out", "linear", {})
    assert facts["notes"] == [
        "config.json: max_position_embeddings is 2048 in one but 99 in two; the first is kept"
    ]
    path.write_text(json.dumps(content | {"num_attention_heads": 4}))
    with pytest.raises(RunError, match="num_attention_heads is 2 in one but 4 in two"):
        merge([one, two], None, tmp_path / "other", "linear", {})
    path.write_text("{")
    with pytest.raises(RunError, match=r"two/config\.json: is not JSON"):
        merge([one, two], None, tmp_path / "other", "linear", {})
    assert not (tmp_path / "other").exists()


def test_everything_that_differs_is_in_one_message_with_what_to_do(
    make: Make, tmp_path: Path
) -> None:
    one = make("one", 1, 6, ["a", "b"], tie_word_embeddings=True)
    two = make("two", 2, 8, ["b", "a"], intermediate_size=32, num_key_value_heads=1)
    path = two / "model.safetensors"
    counts = {"counts": torch.arange(3)}
    save_file(weights(two) | counts, path, metadata={"format": "pt"})
    save_file(
        weights(one) | {"counts": counts["counts"] + 1},
        one / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(RunError) as raised:
        merge([one, two], None, tmp_path / "out", "linear", {})
    text = str(raised.value)
    for said in (
        "model.embed_tokens.weight is (6, 16) in one but (8, 16) in two",  # vocabulary
        "mlp.up_proj.weight is (24, 16) in one but (32, 16) in two",  # shapes
        "lm_head.weight is a tensor of its own in two but the embedding in one",  # tied heads
        "counts holds I64 that differ",  # types
        "tokenizer.json: 'a' is 0 in one but 1 in two",  # tokenizers
        "num_key_value_heads is 2 in one but 1 in two",
        "set pad: trim",
        "untie it in all",
        "merge models of one tokenizer",
        "merge models of one architecture and size",
        "undo quantization",
    ):
        assert said in text, said
