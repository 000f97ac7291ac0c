"""Maps are sparse, rows sum to at most one, and MinED is the published code's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fusion.models import load_tokenizer
from fusion.vocabulary import VOCABULARY_MAPS, build, min_ed

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


@pytest.mark.parametrize("method", VOCABULARY_MAPS)
@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_rows_sum_to_one_or_nothing_and_roles_meet(
    tiny: dict[str, Path], method: str, source: str, target: str
) -> None:
    one, other = load_tokenizer(tiny[source]), load_tokenizer(tiny[target])
    found = build(one, other, method)
    assert found.shape == (len(one), len(other))
    sums = found.sum(axis=1)
    assert ((sums == 0) | (sums == 1)).all()
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
