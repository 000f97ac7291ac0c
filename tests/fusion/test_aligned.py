"""Rows carried to the target: by common bytes, and exactly as the published code does it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from transformers import PreTrainedTokenizerFast

from fusion.aligned import align, dtw_pairs
from fusion.codec import Distribution
from fusion.corpus import Piece, read_piece
from fusion.measures import bits_per_byte
from fusion.vocabulary import VOCABULARY_MAPS

PUBLISHED = {
    "unaligned": "one_hot@reference",
    "collision": "first@reference",
    "tail": "renormalise@reference",
}


def one_image(images: np.ndarray, width: int) -> sparse.csr_array:
    rows = np.flatnonzero(images >= 0)
    return sparse.csr_array((np.ones(len(rows)), (rows, images[rows])), shape=(len(images), width))


def expected_rows(outputs: dict) -> list[dict[int, float]]:
    """Recorded rows as {id: probability}."""
    rows = []
    for values, ids in zip(outputs["logits"], outputs["indices"], strict=True):
        weights = np.exp(np.array(values) - max(values, default=0.0))
        rows.append(dict(zip(ids, weights / weights.sum(), strict=True)))
    return rows


@pytest.mark.parametrize(
    ("method", "key"), [("exact@reference", "hard"), ("min_ed@reference", "soft")]
)
def test_the_published_codes_rows(shared: Path, method: str, key: str) -> None:
    golden = shared / "golden"
    tokenizers = {
        name: PreTrainedTokenizerFast(tokenizer_file=str(golden / "tokenizers" / f"{name}.json"))
        for name in ("uni8k", "bpe8k")
    }
    images: dict[str, np.ndarray] = {}
    lines = (golden / "transform.jsonl").read_text().splitlines()
    seen = ""
    for record in map(json.loads, lines):
        target, source = tokenizers[record["base"]], tokenizers[record["blending"]]
        if record["base"] not in images:
            images[record["base"]] = VOCABULARY_MAPS[method](source, target)
        vocabulary_map = one_image(images[record["base"]], len(target))
        text = record["text"]
        ids = np.array(record["base_ids"])
        piece = Piece(0, "d", text, False, ids, np.zeros(len(ids), np.int64))
        assert read_piece(source, piece)[0].tolist() == record["blending_ids"]
        kept = np.array(record["blending_logits"])
        rows = Distribution(
            np.zeros(len(kept), np.int64),
            np.zeros(len(kept), np.int64),
            np.array(record["blending_indices"]),
            kept - 30,  # any constant: the published code keeps no normaliser
            np.zeros(len(kept)),
            np.zeros(len(kept)),
        )
        pairs = dtw_pairs([piece], source, target, vocabulary_map)
        found = align(rows, [piece], vocabulary_map, pairs=pairs, **PUBLISHED)
        kinds = record["outputs"][key]["kinds"]
        seen += kinds
        paired = np.zeros(len(ids), bool)
        paired[pairs[:, 0]] = True
        assert paired.tolist() == [kind in "RE" for kind in kinds], record["id"]
        assert found.covered.all()
        for t, row in enumerate(expected_rows(record["outputs"][key])):
            at = slice(*found.probabilities.indptr[t : t + 2])
            p = dict(
                zip(found.probabilities.indices[at], found.probabilities.data[at], strict=True)
            )
            assert {int(i) for i, value in p.items() if value > 0} == set(row)
            for index, value in row.items():
                assert p[index] == pytest.approx(value, rel=1e-12)
    assert set("RUM") <= set(seen)


def piece(text: str, ids: list[int], ends: list[int]) -> Piece:
    return Piece(0, "d", text, False, np.array(ids), np.array(ends))


def test_a_row_moves_only_between_positions_with_the_same_prefix() -> None:
    block = [piece("abcd", [0, 1, 2], [1, 3, 4]), piece("xy", [3, 4], [1, 2])]
    source = Distribution(
        pieces=np.array([0, 0, 1, 1]),
        ends=np.array([3, 4, 1, 2]),
        ids=np.array([[0, 1], [1, 0], [2, 1], [0, 2]]),
        logprobs=np.log([[0.5, 0.25], [0.5, 0.2], [0.6, 0.1], [0.3, 0.2]]),
        log_tail=np.zeros(4),
        gold_logprob=np.array([-1.0, np.nan, -2.0, np.nan]),
    )
    # Source tokens 0 and 1 both become target token 4; source token 2 has no image.
    images = sparse.csr_array(np.array([[0, 0, 0, 0, 1.0], [0, 0, 0, 0, 1.0], [0, 0, 0, 0, 0]]))
    found = align(source, block, images)
    assert found.covered.tolist() == [False, True, False, True, False]
    dense = found.probabilities.toarray()
    assert dense[1] == pytest.approx([0, 0, 0, 0, 0.75])  # collisions add up
    assert dense[3] == pytest.approx([0, 0, 0, 0, 0.1])  # what has no image is tail
    assert found.tail[3] == pytest.approx(0.9)
    # Bytes: 4 − 3 read before the first prediction, and 2 − 1.
    assert bits_per_byte([source], block) == pytest.approx([3.0 / (2 * np.log(2))])


def two_tokens(**options: object) -> tuple[np.ndarray, np.ndarray]:
    """Rows (T, V) and what is covered, for a text of three target tokens and one shared end."""
    block = [piece("abcd", [0, 1, 2], [1, 3, 4])]
    source = Distribution(
        pieces=np.array([0, 0]),
        ends=np.array([3, 4]),
        ids=np.array([[0, 1, 2], [1, 0, 2]]),
        logprobs=np.log([[0.5, 0.25, 0.05], [0.5, 0.2, 0.1]]),
        log_tail=np.log([0.2, 0.2]),
        gold_logprob=np.array([-1.0, np.nan]),
    )
    # Tokens 0 and 1 both become 4, token 2 becomes 3, and 3 and 4 have no image.
    images = one_image(np.array([4, 4, 3, -1, -1]), 5)
    found = align(source, block, images, **options)  # type: ignore[arg-type]
    return found.probabilities.toarray(), found.covered


def test_what_a_recipe_may_say_about_rows() -> None:
    rows, covered = two_tokens()
    assert covered.tolist() == [False, True, False]
    assert rows[1] == pytest.approx([0, 0, 0, 0.05, 0.75])
    rows, _ = two_tokens(collision="first@reference")
    assert rows[1] == pytest.approx([0, 0, 0, 0.05, 0.5])
    rows, _ = two_tokens(tail="renormalise@reference", collision="first@reference")
    assert rows[1] == pytest.approx([0, 0, 0, 0.05 / 0.55, 0.5 / 0.55])
    rows, covered = two_tokens(unaligned="one_hot")
    assert covered.tolist() == [True, True, False]  # nothing follows the last
    assert rows[0] == pytest.approx([0, 1, 0, 0, 0])
    rows, covered = two_tokens(unaligned="one_hot@reference")
    assert covered.all()
    assert rows[0] == pytest.approx([1, 0, 0, 0, 0])  # the token that was just read
    assert rows[2] == pytest.approx([0, 0, 1, 0, 0])


def test_temperature_flattens_the_tail_with_the_rest() -> None:
    rows, _ = two_tokens(temperature=2.0)
    # Two unknown tokens share 0.2.
    p = np.sqrt([0.5, 0.25, 0.05, 0.1, 0.1])
    p /= p.sum()
    assert rows[1] == pytest.approx([0, 0, 0, p[2], p[0] + p[1]])
    assert two_tokens(temperature=1.0)[0] == pytest.approx(two_tokens()[0])
