"""Map a source's vocabulary to the target's: a sparse matrix that moves probability.

A map is a plain function of two tokenizers and its line in VOCABULARY_MAPS at the foot. Rows are
source ids, columns target ids; a row sums to one, or to zero where a token has no image and its
probability goes to the tail. Special tokens map by role, never by spelling.

Shapes: U source vocabulary, V target vocabulary.
"""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary
from zipfile import BadZipFile

import numpy as np
from scipy import sparse

from fusion.alignment import MARKERS, align_boundaries, align_dtw
from fusion.conversations import learned
from fusion.corpus import Piece, read_piece
from fusion.errors import RunError
from fusion.tokens import ROLES, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE_MARKERS: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()
_FALLBACK = re.compile("<0x[0-9A-F]{2}>")


def load_map(path: str | Path) -> sparse.csr_array:
    """A saved map, csr (U, V); RunError if the file is missing or damaged."""
    try:
        return sparse.csr_array(sparse.load_npz(path))
    except (OSError, ValueError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        folder = Path(path).parent
        raise RunError(f"{path}: missing or damaged; delete {folder} and run again") from error


def build(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    method: str = "prefix",
    *,
    counts: sparse.csr_array | None = None,
    source_size: int | None = None,
    target_size: int | None = None,
) -> sparse.csr_array:
    """The map of a named method: csr (U, V), rows sum to at most 1.

    counts: of `count_pairs`, for the methods that ask for them (`needs_counts`). source_size,
    target_size: rows of the models' output heads where they exceed the tokenizers.

    Relative to the published code: special tokens map by role, but for the maps `@reference`, where
    spelling decides.
    """
    given = {"counts": counts} if needs_counts(method) else {}
    images = VOCABULARY_MAPS[method](source_tokenizer, target_tokenizer, **given)
    for role in () if method.endswith("@reference") else reversed(ROLES):
        source, target = getattr(source_tokenizer, role), getattr(target_tokenizer, role)
        if source is not None and target is not None:
            images[source] = target
    rows = np.flatnonzero(images >= 0)
    sizes = (
        max(len(images), source_size or 0),
        max(len(token_bytes(target_tokenizer)), target_size or 0),
    )
    return sparse.csr_array((np.ones(len(rows)), (rows, images[rows])), shape=sizes)


def needs_counts(method: str) -> bool:
    """Whether a map is made from how often tokens meet in a corpus."""
    return "counts" in inspect.signature(VOCABULARY_MAPS[method]).parameters


def count_pairs(
    blocks: Iterable[Sequence[Piece]],
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    alignment: str = "boundary",
    template: str = "own",
) -> sparse.csr_array:
    """How often a source token meets a target token in a corpus, csr (U, V).

    boundary: tokens meet that begin at the same byte, so that the target says the one where the
    source says the other. dtw: tokens that dynamic time warping pairs, as in FuseChat (2402.16107).
    """
    source_ids: list[np.ndarray] = []
    target_ids: list[np.ndarray] = []
    for block in blocks:
        for piece in block:
            theirs, their_ends = read_piece(source_tokenizer, piece, template)
            their_begins, begins = (np.append(0, e[:-1]) for e in (their_ends, piece.ends))
            ours = piece.ids
            if piece.messages:  # tokens of answers only
                said, kept = learned(their_ends), piece.learned
                theirs, their_begins = theirs[said], their_begins[said]
                ours, begins = ours[kept], begins[kept]
            if alignment == "dtw":
                warped = align_dtw(
                    target_tokenizer.convert_ids_to_tokens(ours.tolist()),
                    source_tokenizer.convert_ids_to_tokens(theirs.tolist()),
                    target_marker=space_marker(target_tokenizer),
                    source_marker=space_marker(source_tokenizer),
                )
                target = np.repeat(np.arange(len(warped)), [len(found) for found in warped])
                source = np.concatenate([np.array(found, np.int64) for found in warped])
            else:
                target, source = align_boundaries(begins, their_begins).T
            source_ids.append(theirs[source])
            target_ids.append(ours[target])
    rows, columns = np.concatenate(source_ids), np.concatenate(target_ids)
    sizes = len(token_bytes(source_tokenizer)), len(token_bytes(target_tokenizer))
    counts = sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=sizes).tocsr()
    counts.sum_duplicates()
    return sparse.csr_array(counts)


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

    images = exact_spelling(source_tokenizer, target_tokenizer)
    source, target = _respelled(source_tokenizer, target_tokenizer), _spellings(target_tokenizer)
    rest = np.flatnonzero(images < 0)
    for start in range(0, len(rest), 2048):
        rows = rest[start : start + 2048]
        asked = [source[row] for row in rows]
        cost = cdist(asked, target, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1)
        images[rows] = cost.argmin(axis=1)
    return images


def statistics(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    counts: sparse.csr_array,
) -> np.ndarray:
    """Each token to the target's token that it meets most often in the corpus.

    Of equally frequent ones the nearest in spelling, then the one of the lowest id. A token that
    the corpus does not hold goes where `prefix` sends it.

    FuseChat (2402.16107, mapping statistics). Relative to the paper: it hands tokens never seen to
    UNK or EOS.
    """
    entries, distance, _ = _met(source_tokenizer, target_tokenizer, counts)
    order = np.lexsort((entries.col, distance, -entries.data, entries.row))
    images = prefix(source_tokenizer, target_tokenizer)
    _first_of_row(images, entries, order)
    return images


def statistics_reference(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    counts: sparse.csr_array,
) -> np.ndarray:
    r"""Each token to the target's token of the lowest score among those it meets.

        score(u, v) = lev(u, v) · c · sigmoid(count),   c = 0.1 if one holds the other, else 1

    FuseChat's released code. Relative to the paper: the score grows with the count, so that of two
    equally near tokens the rarer one wins. Tokens never seen go to UNK, or EOS if there is none.
    """
    entries, distance, contained = _met(source_tokenizer, target_tokenizer, counts)
    score = distance * np.where(contained, 0.1, 1.0) / (1 + np.exp(-entries.data))
    order = np.lexsort((entries.col, score, entries.row))
    last = target_tokenizer.unk_token_id
    last = target_tokenizer.eos_token_id if last is None else last
    images = np.full(counts.shape[0], -1 if last is None else last, dtype=np.int64)
    _first_of_row(images, entries, order)
    return images


def _met(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    counts: sparse.csr_array,
) -> tuple[sparse.coo_array, np.ndarray, np.ndarray]:
    """The pairs that met, the distance of their spellings, and whether one holds the other."""
    from rapidfuzz.distance import Levenshtein

    entries = counts.tocoo()
    source, target = _respelled(source_tokenizer, target_tokenizer), _spellings(target_tokenizer)
    names = [(source[u], target[v]) for u, v in zip(entries.row, entries.col, strict=True)]
    distance = np.array([Levenshtein.distance(*pair) for pair in names], dtype=np.int64)
    return entries, distance, np.array([a in b or b in a for a, b in names], dtype=bool)


def _first_of_row(images: np.ndarray, entries: sparse.coo_array, order: np.ndarray) -> None:
    rows, first = np.unique(entries.row[order], return_index=True)
    images[rows] = entries.col[order][first]


def exact_spelling(
    source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """Each token to the target's token of the same spelling, the space marker aside; −1 for none.

    FuseLLM's exact match (2401.10491, section 3.2, EM), as released.
    """
    target = _spellings(target_tokenizer)
    by_spelling = {token: index for index, token in reversed(list(enumerate(target)))}
    source = _respelled(source_tokenizer, target_tokenizer)
    return np.array([by_spelling.get(token, -1) for token in source], dtype=np.int64)


def _spellings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(t) for t in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]


def _respelled(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> list[str]:
    """The source's spellings with its space marker written as the target's."""
    marker, own = space_marker(source), space_marker(target)
    if not (marker and own):
        return _spellings(source)
    return [token.replace(marker, own) for token in _spellings(source)]


def space_marker(tokenizer: PreTrainedTokenizerBase) -> str:
    """How a vocabulary writes a space: what most tokens that begin with a marker begin with."""
    if tokenizer not in _SPACE_MARKERS:
        spellings = _spellings(tokenizer)
        counts = {m: sum(token.startswith(m) for token in spellings) for m in MARKERS}
        best = max(MARKERS, key=lambda m: counts[m])
        _SPACE_MARKERS[tokenizer] = best if counts[best] else ""
    return _SPACE_MARKERS[tokenizer]


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
    "statistics": statistics,
    "exact@reference": exact_spelling,
    "min_ed@reference": min_ed,
    "statistics@reference": statistics_reference,
}
