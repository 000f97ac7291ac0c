"""The next byte under a model of tokens, against sums over all that covers the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.tokens import token_bytes
from harness.branches import Branches, predict
from harness.bytewise import END, mix_bytes, score_bytes, spellings
from harness.fallback import plain_logits
from harness.scoring import SharedPrefixLM
from harness.treewise import spreads

NAMES = ("llama", "gemma", "neox")


@pytest.fixture(scope="module")
def models(tiny: dict[str, Path]) -> dict[str, SharedPrefixLM]:
    return {name: SharedPrefixLM(str(tiny[name])) for name in NAMES}


def enumerated(lm: SharedPrefixLM, context: str, so_far: bytes) -> np.ndarray:
    """Probabilities (257,) of what follows, from a walk over every stem and every token.

    Stems as the module's head says, found one character at a time; each token of the vocabulary is
    tried after each stem.
    """
    table = token_bytes(lm.tokenizer)
    raw = context.encode() + so_far
    whole = raw.decode(errors="ignore")
    front = lm.tok_encode(context) if context else [lm.prefix_token_id]
    own = lm.tokenizer.encode(context, add_special_tokens=False)
    front = front[: len(front) - len(own)]
    stems: dict[tuple[int, ...], int] = {}
    for number in range(len(whole) + 1):
        ids = lm.tokenizer.encode(whole[:number], add_special_tokens=False)
        for cut in range(len(ids) + 1):
            spelled = b"".join(table[i] or b"?" for i in ids[:cut])
            # The tokenizer of `neox` puts a space in front of a text.
            for text in (raw, b" " + raw):
                if cut and text.startswith(spelled) and text[:1] == spelled[:1]:
                    stems[(*front, *ids[:cut])] = len(spelled) - (len(text) - len(raw))
    stems = {ids: end for ids, end in stems.items() if end <= len(raw)}
    if front:
        stems[tuple(front)] = 0
    inside = raw[len(whole.encode()) :]
    for size in range(1, len(inside) + 1):
        at = len(whole.encode()) + size
        for ids, end in list(stems.items()):
            for token, spelled_ in enumerate(table):
                if spelled_ and raw[end:at] == spelled_ and end < at:
                    stems[(*ids, token)] = at
    out = np.zeros(END + 1)
    first = (lm.tok_encode(context) if context else front)[:1]  # nothing predicts another
    for ids, end in stems.items():
        if list(ids[:1]) != first:
            continue
        log = 0.0
        for at in range(1, len(ids)):
            log += float(plain_logits(lm.model, list(ids[:at]))[-1].log_softmax(-1)[ids[at]])
        p = plain_logits(lm.model, list(ids))[-1].log_softmax(-1).double().exp().numpy()
        rest = raw[end:]
        if not end and lm.tokenizer.encode("a", add_special_tokens=False) and ids == tuple(front):
            lead = table[lm.tokenizer.encode("a", add_special_tokens=False)[0]] or b""
            rest = (b" " if lead[:1] == b" " and raw[:1] != b" " else b"") + rest
        for token, spelled_ in enumerate(table):
            if spelled_ and spelled_.startswith(rest) and len(spelled_) > len(rest):
                out[spelled_[len(rest)]] += np.exp(log) * p[token]
        if end == len(raw):
            out[END] += np.exp(log) * p[lm.eot_token_id]
    return out / out.sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("context", "text"),
    [("The baker cou", "nts s"), ("", "A te"), ("a ", "é!"), ("my sister", " 😀 x")],
)
def test_bytes_are_what_all_tokens_after_all_stems_add_up_to(
    models: dict[str, SharedPrefixLM], name: str, context: str, text: str
) -> None:
    lm = models[name]
    if name == "neox" and not text.isascii():
        return  # has no token for some of these
    ((found,),) = spreads([lm], [(context, [text])])
    raw = text.encode()
    for at in range(len(raw)):
        (row,) = found[0][at : at + 1]
        assert row == pytest.approx(enumerated(lm, context, raw[:at]), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(st.sampled_from("the bakr.\né你😀"), min_size=1, max_size=7))
@settings(max_examples=8)
def test_all_bytes_and_the_end_sum_to_one(
    models: dict[str, SharedPrefixLM], name: str, text: str
) -> None:
    ((own,),) = list(spreads([models[name]], [("The baker", [text])]))
    rows = own[0][: len(text.encode())]
    sums = rows.sum(axis=1)
    heard = sums > 0
    assert sums[heard] == pytest.approx(1)
    assert heard.all() or name == "neox"
    assert mix_bytes([own[0]], np.ones(1)).sum(axis=1) == pytest.approx(1)


def test_a_mixture_of_bytes_sums_to_one_and_lies_between_its_members(
    models: dict[str, SharedPrefixLM],
) -> None:
    members = [models[name] for name in ("llama", "gemma")]
    texts = [" counts seven apples", " é 你"]
    (found,) = list(spreads(members, [("The baker", texts)]))
    for text, own in zip(texts, found, strict=True):
        w = np.array([0.25, 0.75])
        mixed = mix_bytes(own, w)
        assert mixed[: len(text.encode())].sum(axis=1) == pytest.approx(1)
        each = [score_bytes(mix_bytes([one], np.ones(1)), text.encode())[0] for one in own]
        total, _ = score_bytes(mixed, text.encode())
        assert total >= min(each) + len(text.encode()) * np.log(0.25)
        rows = np.arange(len(text.encode()))
        p = [one[rows, np.frombuffer(text.encode(), np.uint8)] for one in own]
        assert total == pytest.approx(np.log(w @ np.stack(p)).sum())


def test_a_text_scores_the_same_in_one_piece_or_in_two(models: dict[str, SharedPrefixLM]) -> None:
    for name in ("llama", "gemma"):
        whole, first = " counts seven apples", " counts sev"
        asked = [("The baker", [whole, first]), ("The baker" + first, [whole[len(first) :]])]
        found = list(spreads([models[name]], asked))
        totals = [
            score_bytes(one[0], text.encode())[0]
            for (_, texts), own in zip(asked, found, strict=True)
            for text, one in zip(texts, own, strict=True)
        ]
        assert totals[0] == pytest.approx(totals[1] + totals[2], abs=1e-3)


def test_how_the_bytes_of_one_model_relate_to_its_tokens(models: dict[str, SharedPrefixLM]) -> None:
    """By bytes: the text begins so, however it is cut; by tokens: it is cut so and ends there."""
    lm = models["gemma"]
    ((own,),) = list(spreads([lm], [("", ["The baker counts"])]))
    by_byte, _ = score_bytes(own[0], b"The baker counts")
    ids = lm.tokenizer.encode("The baker counts", add_special_tokens=False)
    (by_token,) = lm.score([([lm.prefix_token_id], ids)])
    # From the text's beginning on, the cut that the tokenizer makes is one of those that count.
    assert by_byte > by_token.total


def test_tokens_of_like_bytes_are_neighbours(models: dict[str, SharedPrefixLM]) -> None:
    lm = models["llama"]
    table, found = token_bytes(lm.tokenizer), spellings(lm.tokenizer)
    for begun in (b"", b" ", b" b", b"\xf0", b"nothing", b"\xff"):
        groups, values, stop = found.following(begun)
        ends = [*groups[1:].tolist(), stop]
        listed: dict[int, list[int]] = {}
        for start, end, byte in zip(groups.tolist(), ends, values.tolist(), strict=False):
            listed[byte] = sorted(found.order[start:end])
        expected: dict[int, list[int]] = {}
        for token, raw in enumerate(table):
            if raw and raw.startswith(begun) and len(raw) > len(begun):
                expected.setdefault(raw[len(begun)], []).append(token)
        assert listed == expected


@pytest.mark.parametrize("shares", [True, False])
def test_a_tree_predicts_what_each_path_alone_does(
    models: dict[str, SharedPrefixLM], monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    lm = models["gemma"]
    monkeypatch.setattr(lm, "_shares", shares)
    trees: list[Any] = [Branches([1, 5, 9]), Branches([1, 300])]
    paths = [(0, [7, 8, 11]), (0, [7, 12]), (1, [4])]
    nodes = [trees[tree].path(tokens)[-1] for tree, tokens in paths]
    found = predict(lm, trees)
    for (tree, tokens), node in zip(paths, nodes, strict=True):
        plain = plain_logits(lm.model, [*trees[tree].context, *tokens])[-1].log_softmax(-1)
        got = found[tree].logprobs([node])[0]
        assert got.numpy() == pytest.approx(plain.numpy(), abs=1e-4)
