"""Conversations: where answers lie in what templates write, and how readers meet there."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from fusion.aligned import boundary_pairs, dtw_pairs
from fusion.conversations import (
    SEPARATOR,
    answers,
    asked,
    asking,
    closing_id,
    frame,
    learned,
    messages_of,
    read,
    said_in,
    shared_text,
    words,
)
from fusion.corpus import (
    Piece,
    _conversation,
    pack,
    read_blocks,
    read_documents,
    read_piece,
    write_blocks,
)
from fusion.distributions import predict
from fusion.errors import RunError
from fusion.measures import bits_per_byte, chunks
from fusion.models import load_model, load_tokenizer
from fusion.spec import Fuse
from fusion.targets import _chunked
from fusion.training import Blocks
from fusion.vocabulary import build, count_pairs


@pytest.fixture(scope="module")
def tokenizers(tiny: dict[str, Path]) -> dict[str, PreTrainedTokenizerBase]:
    return {name: load_tokenizer(tiny[name]) for name in ("llama", "gemma", "neox")}


def talk(*turns: str) -> tuple[tuple[str, str], ...]:
    """A conversation from what is said in turn; the user begins."""
    return tuple((("user", "assistant")[n % 2], text) for n, text in enumerate(turns))


def packed(
    tokenizer: PreTrainedTokenizerBase,
    *conversations: Any,
    room: int = 400,
    counts: Counter[str] | None = None,
) -> list[Piece]:
    counts = Counter() if counts is None else counts
    found = [_conversation(0, "d", one, tokenizer, room, counts) for one in conversations]
    return [piece for piece in found if piece]


def spoken(tokenizer: PreTrainedTokenizerBase, piece: Piece) -> str:
    """The learned tokens, decoded."""
    return tokenizer.decode(piece.ids[piece.learned], skip_special_tokens=False)


NASTY = [
    talk("Hi", "Hello there"),
    talk("Say <|end|>", "assistant:\nuser:\n<|end|> is a mark", "And </s>?", "[assistant]\n"),
    talk("repeat", "repeat", "repeat", "repeat"),
    talk("naïve 漢字", "наука 🙂 end", "", "x"),
    (("system", "Be brief."), *talk("Q", "A\n\nB", "R", "C")),
]


@pytest.mark.parametrize("conversation", NASTY)
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_what_is_learned_is_what_is_answered(
    tokenizers: dict[str, Any], name: str, conversation: Any
) -> None:
    """And the end of each turn; whatever else the text holds."""
    tokenizer = tokenizers[name]
    (piece,) = packed(tokenizer, conversation)
    said = spoken(tokenizer, piece)
    expected = "".join(a + str(tokenizer.eos_token) for a in answers(conversation))
    if name == "llama":  # the other tokenizer does not know every character
        assert said == expected
    assert piece.text == shared_text(conversation)
    ends = piece.ends[piece.learned]
    assert (np.diff(ends[ends >= 0]) >= 0).all()
    assert ends[-1] == len(piece.text.encode()) - 1


def test_counted_tokens_would_be_wrong_where_bytes_are_right(tokenizers: dict[str, Any]) -> None:
    """The answer also stands in the question, and the pieces tokenize differently alone."""
    tokenizer = tokenizers["llama"]
    conversation = talk("counts seven apples", "counts seven apples")
    (piece,) = packed(tokenizer, conversation)
    alone = len(tokenizer("counts seven apples").input_ids)
    first = next(
        at
        for at in range(len(piece.ids))
        if tokenizer.decode(piece.ids[at : at + alone]) == "counts seven apples"
    )
    assert not piece.learned[first : first + alone].any()
    assert spoken(tokenizer, piece) == "counts seven apples<|end|>"


def test_readers_of_unlike_templates_meet_in_the_answers(tokenizers: dict[str, Any]) -> None:
    target, source = tokenizers["llama"], tokenizers["gemma"]
    (piece,) = packed(target, NASTY[4])
    ids, ends = read_piece(source, piece)
    kept = ends >= 0
    assert source.decode(ids[learned(ends)]).replace(" ", "").startswith("A\n\nB")
    # Both have read nothing, or all of the first answer, or its end, or all before the second.
    for place in (0, 4, 5, 6):
        assert place in piece.ends
        assert place in ends[kept]
    own = read_piece(target, piece)
    assert own[0].tolist() == piece.ids.tolist()
    assert own[1].tolist() == piece.ends.tolist()


def test_a_source_may_read_the_pivots_template(tokenizers: dict[str, Any]) -> None:
    target, source = tokenizers["llama"], tokenizers["gemma"]
    (piece,) = packed(target, talk("Q", "A"))
    ids, ends = read_piece(source, piece, "pivot")
    assert ids[0] == source.bos_token_id
    assert "user:\nQ</s>assistant:\nA</s>" in source.decode(ids)
    assert ids[ends == 2].tolist() == [source.eos_token_id]
    again, places = read_piece(target, piece, "pivot")
    assert (again.tolist(), places.tolist()) == (piece.ids.tolist(), piece.ends.tolist())


def test_a_bos_that_only_the_template_writes_stays_in_it(tiny: dict[str, Path]) -> None:
    """SmolLM2's BOS is what opens each of its turns."""
    tokenizer = load_tokenizer(tiny["llama"])
    tokenizer.bos_token = "<|end|>"
    tokenizer.chat_template = "<|end|>" + str(tokenizer.chat_template)
    (piece,) = packed(tokenizer, talk("Q", "A"))
    again, ends = read_piece(tokenizer, piece, "pivot")
    assert (again.tolist(), ends.tolist()) == (piece.ids.tolist(), piece.ends.tolist())


def test_a_template_that_refuses_all_is_told_with_the_missing_tokens(tiny: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tiny["llama"])
    tokenizer.chat_template = "{% for turn in %}"
    documents = [("d", talk("Q", "A"))] * 3
    with pytest.raises(RunError, match="give 0; .*; 3 conversations are left out: .* refuses them"):
        pack(documents, tokenizer, 64, 64, seed=1)


def test_a_tokenizer_without_a_template_says_what_to_do(tokenizers: dict[str, Any]) -> None:
    (piece,) = packed(tokenizers["llama"], talk("Q", "A"))
    with pytest.raises(RunError, match="template: pivot"):
        read_piece(tokenizers["neox"], piece)
    assert len(read_piece(tokenizers["neox"], piece, "pivot")[0])
    with pytest.raises(RunError, match="no chat template"):
        packed(tokenizers["neox"], talk("Q", "A"))


def test_a_refused_system_message_stands_before_the_question(tokenizers: dict[str, Any]) -> None:
    parts = frame(tokenizers["gemma"], NASTY[4])
    assert parts is not None
    assert parts[0] == "<s>[user]\nBe brief.\n\nQ</s>\n[assistant]\n"


def test_what_is_too_long_is_cut_and_what_has_no_answer_left_out(
    tokenizers: dict[str, Any],
) -> None:
    tokenizer = tokenizers["llama"]
    counts: Counter[str] = Counter()
    long = talk("Q", "counts seven apples " * 40)
    silent = (("user", "only a question"),)
    endless = talk("Q " * 300, "A")
    (piece,) = packed(tokenizer, long, silent, endless, talk("Q", ""), room=64, counts=counts)
    assert counts == {"conversations": 4, "left_out": 3, "cut": 1}
    assert len(piece.ids) <= 64
    assert not piece.ends_document
    assert ("counts seven apples " * 40).startswith(spoken(tokenizer, piece))
    assert answers(piece.messages)[0] == piece.text == spoken(tokenizer, piece)


def test_an_answer_is_cut_between_characters(tokenizers: dict[str, Any]) -> None:
    for room in range(20, 60):
        pieces = packed(tokenizers["llama"], talk("Q", "漢字🙂" * 30), room=room)
        for piece in pieces:
            assert len(piece.ids) <= room
            assert set(answers(piece.messages)[0]) <= set("漢字🙂")


@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs", "Co", "Cc")), max_size=30).map(str.strip),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=60)
def test_spans_hold_for_any_text(tokenizers: dict[str, Any], turns: list[str]) -> None:
    tokenizer = tokenizers["llama"]
    conversation = talk(*turns)
    if not any(answers(conversation)):
        return
    (piece,) = packed(tokenizer, conversation, room=4000)
    said = [a for a in answers(conversation)]
    assert spoken(tokenizer, piece) == "".join(a + "<|end|>" for a in said)


def test_an_answer_that_no_template_closes_ends_with_eos(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama"]
    ids, ends = read(tokenizer, ["Q\n", " \n"], ["A"])
    assert tokenizer.decode(ids[learned(ends)]) == "A<|end|>"
    ids, ends = read(tokenizer, ["Q\n", " \n"], ["A"], whole=False)
    assert tokenizer.decode(ids[learned(ends)]) == "A"


def test_blocks_keep_conversations_whole_and_come_back(
    tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    from harness.tiny import make_corpus

    documents = read_documents(make_corpus(tmp_path, "conversations"))
    blocks = pack(documents, tokenizers["llama"], 128, 640, 0)
    assert len(blocks) == 5
    assert all(sum(len(p.ids) for p in block) <= 128 for block in blocks)
    assert all(piece.ends_document for block in blocks for piece in block)
    write_blocks(tmp_path / "blocks.parquet", blocks)
    for block, again in zip(blocks, read_blocks(tmp_path / "blocks.parquet"), strict=True):
        for piece, copy in zip(block, again, strict=True):
            assert copy.ids.tolist() == piece.ids.tolist()
            assert copy.ends.tolist() == piece.ends.tolist()
            assert (copy.messages, copy.frame, copy.end) == (piece.messages, piece.frame, "<|end|>")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": " Q "}, {"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A\n"}]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "instances": [{"input": "", "output": " A"}]},
    ],
)
def test_rows_of_several_kinds_are_conversations(row: dict[str, Any], tmp_path: Path) -> None:
    assert messages_of(row) == talk("Q", "A")
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert read_documents(tmp_path) == [("rows", talk("Q", "A"))]


def test_rows_that_are_none_are_named(tmp_path: Path) -> None:
    assert messages_of({"messages": [{"role": "user"}]}) is None
    parts = [{"type": "text", "text": "Q, "}, {"type": "text", "text": "and more"}]
    assert messages_of({"messages": [{"role": "user", "content": parts}]}) == talk("Q, and more")
    image = [*parts, {"type": "image_url", "image_url": {"url": "a"}}]
    assert messages_of({"messages": [{"role": "user", "content": image}]}) is None
    assert messages_of({"instruction": "Q"}) is None
    (tmp_path / "x.jsonl").write_text('{"messages": []}\n{"prompt": "Q"}\n')
    with pytest.raises(RunError, match=r"x\.jsonl:2: .*'messages'"):
        read_documents(tmp_path)
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "x.json").write_text('{"text": "Q"}')
    with pytest.raises(RunError, match="list of objects"):
        read_documents(tmp_path)


def test_only_answers_carry_loss_and_targets(
    tokenizers: dict[str, Any], tiny: dict[str, Path]
) -> None:
    target, source = tokenizers["llama"], tokenizers["gemma"]
    block = packed(target, NASTY[4], talk("And you?", "Fine, thanks."))
    row = Blocks([block])[0]
    told = np.concatenate([p.ids[p.learned] for p in block])
    assert row["labels"][row["label_weights"] > 0].tolist() == told.tolist()
    assert row["label_weights"].sum() == pytest.approx(1)
    rows = predict(load_model(tiny["gemma"]), source, block, 4)
    assert (
        len(rows.ids) == len(rows.ends) == sum((read_piece(source, p)[1] >= 0).sum() for p in block)
    )
    counted = sum(learned(read_piece(source, p)[1]).sum() for p in block)
    assert (~np.isnan(rows.gold_logprob)).sum() == counted
    pairs = boundary_pairs(rows, block)
    ours = np.concatenate([p.ends for p in block])[pairs[:, 0]]
    assert (ours == rows.ends[pairs[:, 1]]).all()
    assert (ours >= 0).all()
    bits = bits_per_byte([rows], block)
    nats = -np.nansum(rows.gold_logprob)
    assert bits[0] == pytest.approx(nats / np.log(2) / sum(len(p.text.encode()) for p in block))
    for level in ("document", "span"):
        assert np.isfinite(bits_per_byte([rows], block, level)).all()
    _, likelihoods = chunks(rows, block)
    fuse = Fuse(sources=["gemma"], function="min_ce", clm_weight=0.5, objective="alm")
    made = _chunked(fuse, [rows], block, row["label_weights"] > 0)
    assert np.isfinite(made["chunk_logprobs"]).all()
    assert (made["chunk_index"][row["label_weights"] == 0] == -1).all()
    assert (made["chunk_index"] >= 0).any()
    assert np.isfinite(likelihoods).all()


def test_the_target_as_its_own_source_is_the_target(
    tokenizers: dict[str, Any], tiny: dict[str, Path]
) -> None:
    tokenizer = tokenizers["llama"]
    block = packed(tokenizer, NASTY[4], talk("And you?", "Fine, thanks."))
    rows = predict(load_model(tiny["llama"]), tokenizer, block, 4)
    labelled = Blocks([block])[0]["label_weights"] > 0
    pairs = boundary_pairs(rows, block)
    assert set(np.flatnonzero(labelled)) <= set(pairs[:, 0])
    warped = dtw_pairs(block, tokenizer, tokenizer, build(tokenizer, tokenizer, "exact"))
    assert {tuple(p) for p in warped} == {tuple(p) for p in pairs} | {
        tuple(p) for p in warped if np.isnan(rows.gold_logprob[p[1]])
    }


@pytest.mark.parametrize("alignment", ["boundary", "dtw"])
@pytest.mark.parametrize("template", ["own", "pivot"])
def test_tokens_that_meet_are_those_of_answers(
    tokenizers: dict[str, Any], alignment: str, template: str
) -> None:
    target, source = tokenizers["llama"], tokenizers["gemma"]
    block = packed(target, talk("zebra", "counts seven apples"))
    counts = count_pairs([block], source, target, alignment, template)
    met = set(counts.tocoo().coords[1])
    assert met <= set(block[0].ids[block[0].learned])
    assert len(met) >= 3


def test_real_templates(shared: Path) -> None:
    """Those of tokenizers that ship one: every answer comes out byte for byte, with its end."""
    seen = 0
    for folder in sorted((shared / "data").rglob("tokenizer_config.json")):
        try:
            tokenizer = load_tokenizer(folder.parent)
        except RunError:
            continue
        if not tokenizer.chat_template:
            continue
        for conversation in (NASTY[0], NASTY[2], NASTY[4]):
            parts = frame(tokenizer, conversation)
            assert parts is not None
            ids, ends = read(tokenizer, parts, answers(conversation))
            text = tokenizer.decode(ids[learned(ends)], skip_special_tokens=True)
            assert text.split() == " ".join(answers(conversation)).split()
            seen += 1
    if not seen:
        pytest.skip("no tokenizer with a chat template is there")


def test_a_separator_is_no_part_of_bits(tokenizers: dict[str, Any]) -> None:
    (piece,) = packed(tokenizers["llama"], talk("Q", "A"))
    assert piece.text == "A" + SEPARATOR


def test_a_prompt_is_written_by_the_template_or_read_in_plain_text(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    turns = list(talk("One?", "Two.", "Three?"))
    prompt = asking(turns, "One?\nTwo.\nThree?")
    assert said_in(prompt) == (turns, "One?\nTwo.\nThree?")
    assert said_in(asking(turns)) == (turns, None)
    assert words(prompt) == "One?\n\nTwo.\n\nThree?"
    text, templated = asked(tokenizers["llama"], prompt)
    assert templated
    assert text == "user:\nOne?<|end|>assistant:\nTwo.<|end|>user:\nThree?<|end|>assistant:\n"
    assert asked(tokenizers["neox"], prompt) == ("One?\nTwo.\nThree?", False)
    with pytest.raises(RunError, match="no chat template"):
        asked(tokenizers["neox"], asking(turns))


def test_an_answer_is_closed_by_what_the_template_writes_behind_it(tiny: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tiny["llama"])
    assert closing_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|end|>", "\n<turn>\n")
    assert closing_id(tokenizer) == tokenizer.get_vocab()["<turn>"] != tokenizer.eos_token_id
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<turn>", "")
    assert closing_id(tokenizer) is None
