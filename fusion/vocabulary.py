"""Map a source's vocabulary to the target's: a sparse matrix that moves probability.

A map is a plain function of two tokenizers and its line in VOCABULARY_MAPS at the foot. Rows are
source ids, columns target ids; a row sums to one, or to zero where a token has no image and its
probability goes to the tail. Special tokens map by role, never by spelling.

Shapes: U source vocabulary, V target vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from fusion.alignment import MARKERS
from fusion.tokens import token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FALLBACK = re.compile("<0x[0-9A-F]{2}>")
ROLES = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")


def load_map(path: str | Path) -> sparse.csr_array:
    """A saved map, csr (U, V)."""
    return sparse.csr_array(sparse.load_npz(path))


def build(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    method: str = "prefix",
    *,
    source_size: int | None = None,
    target_size: int | None = None,
) -> sparse.csr_array:
    """The map of a named method: csr (U, V), rows sum to at most 1.

    source_size, target_size: rows of the models' output heads where they exceed the tokenizers.
    """
    images = VOCABULARY_MAPS[method](source_tokenizer, target_tokenizer)
    for role in reversed(ROLES):
        source, target = getattr(source_tokenizer, role), getattr(target_tokenizer, role)
        if source is not None and target is not None:
            images[source] = target
    rows = np.flatnonzero(images >= 0)
    sizes = (
        max(len(images), source_size or 0),
        max(len(token_bytes(target_tokenizer)), target_size or 0),
    )
    return sparse.csr_array((np.ones(len(rows)), (rows, images[rows])), shape=sizes)


def prefix(
    source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """Each token to the first token of the target's own tokenization of its bytes; −1 for none.

    If the source expects these bytes next, the target has to say its own first piece of them. Bytes
    that are no whole characters go to the target's token for them, or for the first of them.
    """
    table = token_bytes(source_tokenizer)
    by_bytes = _ids(target_tokenizer)
    images = np.full(len(table), -1, dtype=np.int64)
    texts, owners = [], []
    for index, raw in enumerate(table):
        if not raw:
            continue
        try:
            texts.append(raw.decode())
            owners.append(index)
        except UnicodeDecodeError:
            images[index] = by_bytes.get(raw, by_bytes.get(raw[:1], -1))
    images[owners] = _first_tokens(target_tokenizer, texts)
    return images


def exact(
    source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """Each token to the target's token of the same bytes; −1 for none.

    Relative to the paper: FuseLLM's exact match (EM) compares token strings, so that byte-level and
    SentencePiece spellings of the same bytes differ; here bytes are compared.
    """
    by_bytes = _ids(target_tokenizer)
    table = token_bytes(source_tokenizer)
    return np.array([by_bytes.get(raw, -1) if raw else -1 for raw in table], dtype=np.int64)


def min_ed(
    source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """Each token to the target's token of the same spelling, else of the nearest; never −1.

    Nearest in Levenshtein distance between token strings, the source's space marker written as the
    target's; of several, the one of the lowest id.

    FuseLLM (2401.10491, section 3.2, MinED). Relative to the released code: that takes the first in
    the order of `get_vocab()`, which differs from process to process.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    source, target = _spellings(source_tokenizer), _spellings(target_tokenizer)
    marker, own = _marker(source), _marker(target)
    if marker and own:
        source = [token.replace(marker, own) for token in source]
    by_spelling = {token: index for index, token in reversed(list(enumerate(target)))}
    images = np.array([by_spelling.get(token, -1) for token in source], dtype=np.int64)
    rest = np.flatnonzero(images < 0)
    for start in range(0, len(rest), 2048):
        rows = rest[start : start + 2048]
        asked = [source[row] for row in rows]
        cost = cdist(asked, target, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1)
        images[rows] = cost.argmin(axis=1)
    return images


def _spellings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(t) for t in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]


def _marker(spellings: list[str]) -> str:
    """How a vocabulary writes a space: what most tokens that begin with a marker begin with."""
    counts = {m: sum(token.startswith(m) for token in spellings) for m in MARKERS}
    best = max(MARKERS, key=lambda m: counts[m])
    return best if counts[best] else ""


def _ids(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """The token of each byte string; a byte-fallback token only where nothing else spells it."""
    spellings = _spellings(tokenizer)
    out: dict[bytes, int] = {}
    for fallback in (False, True):
        for index, raw in enumerate(token_bytes(tokenizer)):
            if raw and bool(_FALLBACK.fullmatch(spellings[index])) == fallback:
                out.setdefault(raw, index)
    return out


def _first_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> np.ndarray:
    """First id of each text, without the dummy space that some tokenizers put in front."""
    backend = tokenizer.backend_tokenizer
    table = token_bytes(tokenizer)
    out = np.full(len(texts), -1, dtype=np.int64)
    again = []
    for number, encoding in enumerate(backend.encode_batch(texts, add_special_tokens=False)):
        if not encoding.ids:
            continue
        first = table[encoding.ids[0]]
        if first is None:
            continue  # a special token's name written out, or an unknown token
        if texts[number].encode().startswith(first):
            out[number] = encoding.ids[0]
        else:
            again.append(number)
    # A line break in front takes the dummy, and ends a word for every pre-tokenizer.
    behind = backend.encode_batch(["\n" + texts[n] for n in again], add_special_tokens=False)
    for number, encoding in zip(again, behind, strict=True):
        read = b""
        for index in encoding.ids:
            piece = table[index]
            if read.lstrip(b" ") == b"\n" and piece and texts[number].encode().startswith(piece):
                out[number] = index
                break
            read += piece or b""
    return out


VOCABULARY_MAPS: dict[str, Callable[..., np.ndarray]] = {
    "prefix": prefix,
    "exact": exact,
    "min_ed": min_ed,
}
