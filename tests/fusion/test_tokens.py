"""Byte ends, alignment and vocabulary maps: laws on tokenizers made here, and records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusion.alignment import align_boundaries, kinds
from fusion.models import load_tokenizer
from fusion.tokens import family, token_bytes, tokenize
from fusion.vocabulary import build
from harness.tiny import TEXT

LOSSLESS = ("llama", "gemma")  # every text has tokens of its own bytes
TRICKY = [
    "",
    " ",
    "  two",
    "tab\tand\n\nlines",
    "naïve é e\u0301",
    "你好，世界",
    "😀👩‍👩‍👧",
    "007 3.14",
    "a<s>b",
]


@pytest.fixture(scope="module")
def tokenizers(tiny: dict[str, Path]) -> dict[str, PreTrainedTokenizerBase]:
    out = {name: load_tokenizer(folder) for name, folder in tiny.items()}
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]"], show_progress=False
    )
    wordpiece.train_from_iterator(TEXT, trainer)
    out["wordpiece"] = PreTrainedTokenizerFast(tokenizer_object=wordpiece, unk_token="[UNK]")
    return out


def test_families(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    found = {name: family(tokenizer) for name, tokenizer in tokenizers.items()}
    assert found == {
        "llama": "byte_level",
        "gemma": "sentencepiece",
        "neox": "sentencepiece",
        "wordpiece": "wordpiece",
    }


def check(tokenizer: PreTrainedTokenizerBase, text: str, lossless: bool) -> None:
    tokens = tokenize(tokenizer, text)
    raw = text.encode()
    assert (np.diff(tokens.ends) >= 0).all()
    if len(tokens.ends):
        assert tokens.ends[-1] == len(raw) or tokens.marked.any()
    if not lossless:
        return
    assert not tokens.marked.any()
    table = token_bytes(tokenizer)
    start = 0
    for index, end in zip(tokens.ids, tokens.ends, strict=True):
        known = table[index]
        if known is not None:
            assert raw[start:end] == known
        start = end
    assert start == len(raw)


@pytest.mark.parametrize("text", TRICKY)
def test_spans_tile_tricky_texts(tokenizers: dict[str, PreTrainedTokenizerBase], text: str) -> None:
    for name, tokenizer in tokenizers.items():
        check(tokenizer, text, name in LOSSLESS)


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_spans_tile_any_text(tokenizers: dict[str, PreTrainedTokenizerBase], text: str) -> None:
    for name, tokenizer in tokenizers.items():
        check(tokenizer, text, name in LOSSLESS)


def test_a_dummy_space_has_no_width(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokens = tokenize(tokenizers["neox"], "the baker")
    first = token_bytes(tokenizers["neox"])[tokens.ids[0]]
    assert first is not None
    assert first.startswith(b" t")
    assert tokens.ends[0] == len(first) - 1
    assert tokens.ends[-1] == 9


def test_lowercasing_keeps_the_spans_of_the_original(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    tokens = tokenize(tokenizers["wordpiece"], "The BAKER")
    assert tokens.ends[-1] == 9
    assert 3 in tokens.ends.tolist()
    assert not tokens.marked.any()


sorted_ends = st.lists(st.integers(0, 40), max_size=25).map(sorted)


@given(target=sorted_ends, source=sorted_ends)
def test_pairs_are_ascending_common_and_complete(target: list[int], source: list[int]) -> None:
    pairs = align_boundaries(np.array(target, int), np.array(source, int))
    assert len(pairs) == len(set(target) & set(source))
    for t, s in pairs:
        assert target[t] == source[s]
        # The last of several tokens that end there, on both sides.
        assert t + 1 == len(target) or target[t + 1] > target[t]
        assert s + 1 == len(source) or source[s + 1] > source[s]
    assert (np.diff(pairs, axis=0) > 0).all()
    assert sum(kinds(np.array(target, int), np.array(source, int)).values()) == len(target)


def test_equal_tokenizations_align_to_the_identity() -> None:
    ends = np.array([1, 4, 9, 10])
    assert align_boundaries(ends, ends).tolist() == [[i, i] for i in range(4)]
    assert kinds(ends, ends)["one-to-one"] == 4


def test_common_ends_equal_the_recorded_ones(shared: Path) -> None:
    lines = (shared / "golden" / "alignment.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        target, source = line["base_byte_ends"], line["blending_byte_ends"]
        pairs = align_boundaries(np.array(target, int), np.array(source, int))
        found = [target[t] for t, _ in pairs if target[t] > 0]
        assert found == line["common_boundaries"], line["id"]


def test_byte_ends_equal_the_recorded_ones(shared: Path) -> None:
    folder = shared / "golden" / "tokenizers"
    loaded = {
        name: PreTrainedTokenizerFast(tokenizer_file=str(folder / f"{name}.json"))
        for name in ("bpe8k", "uni8k")
    }
    checked = 0
    for line in map(json.loads, (shared / "golden" / "alignment.jsonl").read_text().splitlines()):
        for side in ("base", "blending"):
            tokenizer = loaded.get(line[side])
            if tokenizer is None:
                continue
            tokens = tokenize(tokenizer, line["text"])
            assert tokens.ids.tolist() == line[f"{side}_ids"], line["id"]
            assert tokens.ends.tolist() == line[f"{side}_byte_ends"], line["id"]
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("method", ["prefix", "exact"])
@pytest.mark.parametrize(
    ("source", "target"), [("gemma", "llama"), ("llama", "neox"), ("neox", "gemma")]
)
def test_maps_move_each_token_at_most_once(
    tokenizers: dict[str, PreTrainedTokenizerBase], method: str, source: str, target: str
) -> None:
    one, two = tokenizers[source], tokenizers[target]
    found = build(one, two, method)
    assert found.shape == (len(one), len(two))
    assert found.sum(axis=1).max() <= 1
    tables = token_bytes(one), token_bytes(two)
    for row, column in zip(*found.nonzero(), strict=True):
        raw, image = tables[0][row], tables[1][column]
        if raw is None or image is None:
            continue  # by role
        assert raw == image if method == "exact" else raw.startswith(image)


def test_a_tokenizer_maps_to_itself(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    # Byte-level BPE has no two tokens of the same bytes, so its map is the identity.
    found = build(tokenizers["llama"], tokenizers["llama"], "exact")
    assert (found.diagonal() == 1).all()


def test_special_tokens_map_by_role_and_heads_may_be_padded(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    gemma, llama = tokenizers["gemma"], tokenizers["llama"]
    found = build(gemma, llama, source_size=len(gemma) + 6, target_size=len(llama) + 2)
    assert found.shape == (len(gemma) + 6, len(llama) + 2)
    assert found[gemma.eos_token_id, llama.eos_token_id] == 1
    assert found[[gemma.pad_token_id]].sum() == 0
