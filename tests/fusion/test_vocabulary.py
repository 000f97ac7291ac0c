"""Maps are sparse, rows sum to at most one, and MinED is the published code's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from transformers import PreTrainedTokenizerFast

from fusion.corpus import Piece, pack, read_piece
from fusion.errors import RunError
from fusion.models import load_tokenizer
from fusion.tokens import tokenize
from fusion.vocabulary import (
    VOCABULARY_MAPS,
    build,
    count_pairs,
    exact,
    load_map,
    min_ed,
    needs_counts,
    statistics,
    statistics_reference,
)

NAMES = ("llama", "gemma", "neox")


@pytest.mark.parametrize("pair", [("uni8k", "bpe8k"), ("bpe8k", "uni8k")])
def test_min_ed_is_the_published_codes(shared: Path, pair: tuple[str, str]) -> None:
    golden = shared / "golden"
    target, source = (
        PreTrainedTokenizerFast(tokenizer_file=str(golden / "tokenizers" / f"{name}.json"))
        for name in pair
    )
    recorded = json.loads((golden / "vocab_map.json").read_text())["maps"][f"{pair[0]}<-{pair[1]}"]
    found = target.convert_ids_to_tokens(min_ed(source, target).tolist())
    assert found == list(recorded["map"].values())


def corpus(tokenizer: PreTrainedTokenizerFast) -> list:
    texts = [("d", "The baker counts seven apples, and nobody asks why. " * 4)] * 4
    return pack(texts, tokenizer, 48, 96, seed=1)


@pytest.mark.parametrize("method", VOCABULARY_MAPS)
@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_rows_sum_to_one_or_nothing_and_roles_meet(
    tiny: dict[str, Path], method: str, source: str, target: str
) -> None:
    one, other = load_tokenizer(tiny[source]), load_tokenizer(tiny[target])
    counts = count_pairs(corpus(other), one, other) if needs_counts(method) else None
    found = build(one, other, method, counts=counts)
    assert found.shape == (len(one), len(other))
    sums = found.sum(axis=1)
    assert ((sums == 0) | (sums == 1)).all()
    if not method.endswith("@reference"):
        assert found[[one.eos_token_id], [other.eos_token_id]] == 1


def test_a_piece_is_preferred_to_the_byte_token_that_spells_the_same(
    tiny: dict[str, Path],
) -> None:
    llama, gemma = load_tokenizer(tiny["llama"]), load_tokenizer(tiny["gemma"])
    for method in ("exact", "min_ed"):
        found = build(llama, gemma, method)
        letter = llama.convert_tokens_to_ids("e")
        assert gemma.convert_ids_to_tokens(found.indices[found.indptr[letter]].item()) == "e"


def test_a_vocabulary_is_padded_to_its_models_head(tiny: dict[str, Path]) -> None:
    one, other = load_tokenizer(tiny["llama"]), load_tokenizer(tiny["gemma"])
    assert build(one, other, source_size=600, target_size=700).shape == (600, 700)


def test_tokens_that_meet_begin_together(tiny: dict[str, Path]) -> None:
    source, target = load_tokenizer(tiny["gemma"]), load_tokenizer(tiny["llama"])
    text = "seven apples, seven"
    tokens = tokenize(target, text)
    piece = Piece(0, "d", text, False, tokens.ids, tokens.ends)
    counts = count_pairs([[piece]], source, target)
    ids, ends = read_piece(source, piece)
    begins = {int(b): int(i) for i, b in zip(tokens.ids, [0, *tokens.ends], strict=False)}
    expected = np.zeros(counts.shape)
    for index, begin, end in zip(ids, [0, *ends], ends, strict=False):
        if begin in begins and end > begin:  # BOS has no width
            expected[index, begins[begin]] += 1
    assert (counts.toarray() == expected).all()
    assert count_pairs([[piece]], source, target, "dtw").sum() >= len(tokens.ids)


def test_frequent_pairs_win_but_not_in_the_published_score(tiny: dict[str, Path]) -> None:
    source, target = load_tokenizer(tiny["gemma"]), load_tokenizer(tiny["llama"])
    a, b, c = (target.convert_tokens_to_ids(token) for token in ("a", "b", "c"))
    seen, other = (source.convert_tokens_to_ids(token) for token in ("s", "e"))
    counts = np.zeros((len(source), len(target)))
    counts[seen, [a, b, c]] = [1, 9, 3]
    found = statistics(source, target, sparse.csr_array(counts))
    assert found[seen] == b
    assert found[other] == exact(source, target)[other]  # never seen: as `prefix` has it
    # All are at distance one, so the score is a sigmoid of the count, and the rarest wins.
    found = statistics_reference(source, target, sparse.csr_array(counts))
    assert found[seen] == a
    assert found[other] == target.eos_token_id


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"junk"])
def test_a_damaged_map_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "map.npz"
    sparse.save_npz(path, sparse.csr_array(np.eye(40)))
    assert (load_map(path) != sparse.csr_array(np.eye(40))).nnz == 0
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"map\.npz: missing or damaged; delete"):
        load_map(path)
