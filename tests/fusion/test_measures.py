"""How well sources predict blocks, documents, spans and chunks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.codec import Distribution
from fusion.corpus import Piece
from fusion.measures import bits_per_byte, chunks, nats_per_token

LN2 = np.log(2)


def piece(ends: list[int]) -> Piece:
    return Piece(0, "d", "x" * ends[-1], False, np.arange(len(ends)), np.array(ends))


def source(*pieces: tuple[list[int], list[float]]) -> Distribution:
    """From byte ends and gold log-probabilities of each piece; a row less has gold than ends."""
    number = np.concatenate([np.full(len(ends), i) for i, (ends, _) in enumerate(pieces)])
    gold = np.concatenate([[*golds, np.nan] for _, golds in pieces])
    nothing = np.zeros((len(number), 1))
    ends = np.concatenate([ends for ends, _ in pieces])
    return Distribution(number, ends, nothing.astype(int), nothing, nothing[:, 0], gold)


def test_nats_a_token_are_the_published_codes(shared: Path) -> None:
    recorded = json.loads((shared / "golden" / "fusion.json").read_text())
    for case in recorded["sequence_ce"]["cases"]:
        real = sum(case["attention_mask"]) - 1
        golds = [-ce for ce in case["token_ce"][:real]]
        ends = list(range(1, real + 2))
        found = nats_per_token([source((ends, golds))], [piece(ends)])
        assert found == pytest.approx([case["sequence_ce"]], abs=1e-12)
    for case in recorded["packing_ce"]["cases"]:
        # Each block holds whole or cut pieces; a piece's loss is that of all of its tokens.
        owner = np.repeat(np.arange(len(case["piece_lengths"])), case["piece_lengths"])
        size = case["block_size"]
        for number, expected in enumerate(case["block_ce"]):
            inside, lengths = np.unique(
                owner[number * size : (number + 1) * size], return_counts=True
            )
            read = [([1, 2], [-case["piece_ce"][index]]) for index in inside]
            block = [piece(list(range(1, length + 1))) for length in lengths]
            assert nats_per_token([source(*read)], block) == pytest.approx([expected], abs=1e-12)


def test_documents_have_their_own_bits() -> None:
    block = [piece([1, 2, 4]), piece([2, 3])]
    read = source(([1, 4], [-3.0]), ([1, 2, 3], [-1.0, -2.0]))
    whole = bits_per_byte([read], block)
    assert whole == pytest.approx([6 / 5 / LN2])
    apart = bits_per_byte([read], block, "document")
    assert apart == pytest.approx(np.array([[1, 1, 1, 1.5, 1.5]]) / LN2)


def test_a_span_is_what_lies_between_common_ends() -> None:
    # The target reads 1|2|3|4, one source 2|4, another 1|2|4: common ends are 2 and 4.
    block = [piece([1, 2, 3, 4])]
    one, two = source(([2, 4], [-6.0])), source(([1, 2, 4], [-1.0, -2.0]))
    found = bits_per_byte([one, two], block, "span")
    # After bytes 0 and 1 comes the first span, after 2 and 3 the second; at the end nothing comes.
    assert found[0] == pytest.approx(np.array([0, 3, 3, 3]) / LN2)
    assert found[1] == pytest.approx(np.array([0.5, 1, 1, 1]) / LN2)


def test_chunks_hold_what_both_sides_predict() -> None:
    index, likelihood = chunks(source(([2, 4, 5], [-6.0, -1.0])), [piece([1, 2, 3, 4, 5])])
    assert index.tolist() == [-1, 0, 0, 1, -1]
    assert likelihood.tolist() == [-6.0, -1.0]
    # A BOS on both sides makes the first bytes a chunk of their own.
    index, likelihood = chunks(source(([0, 2], [-3.0])), [piece([0, 1, 2])])
    assert index.tolist() == [0, 0, -1]
    assert likelihood.tolist() == [-3.0]


WIDTHS = st.lists(st.integers(1, 4), min_size=1, max_size=12)


@given(WIDTHS, WIDTHS, st.integers(0, 1000))
def test_chunks_and_spans_lose_nothing(one: list[int], other: list[int], seed: int) -> None:
    total = max(sum(one), sum(other))
    ours = np.unique([*np.cumsum(one), total]).tolist()
    theirs = np.unique([*np.cumsum(other), total]).tolist()
    gold = -np.random.default_rng(seed).random(len(theirs) - 1)
    read = source((theirs, gold.tolist()))
    index, likelihood = chunks(read, [piece(ours)])
    common = sorted(set(ours) & set(theirs))
    after = np.array(theirs[1:]) > common[0]
    assert likelihood.sum() == pytest.approx(gold[after].sum())
    assert sorted(set(index) - {-1}) == list(range(len(common) - 1))
    spans = bits_per_byte([read], [piece(ours)], "span")[0]
    starts = [ours.index(end) for end in common[:-1]]
    sizes = np.diff(common)
    np.testing.assert_allclose(spans[starts] * sizes * LN2, -likelihood, atol=1e-12)
