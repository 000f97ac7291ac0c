"""Carry a source's distributions to the target's positions and vocabulary.

What the recipe's `alignment`, `unaligned`, `collision` and `tail` mean is here. The defaults are
what is right; the values marked `@reference` are what the published code does.

Shapes: T target positions of a block, P pairs of positions, K kept entries, U source vocabulary,
V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from fusion.alignment import MARKERS, align_boundaries, align_dtw
from fusion.codec import Distribution
from fusion.conversations import learned
from fusion.corpus import Piece, read_piece
from fusion.tokens import family
from fusion.vocabulary import space_marker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Aligned:
    """One source's (or the fused) distribution at the target's positions; rows say what comes next.

    probabilities: csr (T, V); what a row lacks to one is its tail, mass on tokens unknown.
    covered (T,): bool, whether the row says anything.
    """

    probabilities: sparse.csr_array
    covered: np.ndarray

    @property
    def tail(self) -> np.ndarray:
        """Mass outside the kept entries, (T,), in [0, 1]."""
        return np.clip(1.0 - row_sums(self.probabilities, self.probabilities.data), 0.0, 1.0)


# scipy has both as products with other matrices, at several times the cost for rows this short.


def row_sums(rows: sparse.csr_array, values: np.ndarray) -> np.ndarray:
    """Sums over each row of values at its entries, (T,)."""
    owner = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    return np.bincount(owner, values, rows.shape[0])


def scaled(rows: sparse.csr_array, by_T: np.ndarray) -> sparse.csr_array:
    """Each row times a number."""
    data = rows.data * np.repeat(by_T, np.diff(rows.indptr))
    return sparse.csr_array((data, rows.indices, rows.indptr), shape=rows.shape)


def align(
    source: Distribution,
    block: Sequence[Piece],
    vocabulary_map: sparse.csr_array,
    *,
    pairs: np.ndarray | None = None,
    unaligned: str = "mask",
    collision: str = "sum",
    tail: str = "bucket",
    temperature: float = 1.0,
) -> Aligned:
    r"""Carry a source's distributions to the target's positions and vocabulary.

        P[t] = Aᵀ p[s]    for each pair (t, s)

    vocabulary_map: A, csr (U, V), rows sum to at most 1. Mass without an image becomes tail.
    pairs (P, 2): positions of target (ascending) and source, by default those that have read the
    same bytes.
    unaligned: a position in no pair is left out (`mask`), says the token that follows (`one_hot`)
    or its own token (`one_hot@reference`). collision: source tokens with one image add up (`sum`)
    or the likeliest alone counts (`first@reference`). tail: kept as mass on unknown tokens
    (`bucket`) or the kept entries scaled to one (`renormalise@reference`). temperature divides the
    log-probabilities first, the tail spread evenly over the tokens it stands for.

    Relative to the paper: FuseLLM pairs tokens by edit distance and hands the row of a token to its
    partner; by default here a row moves only between positions with the same prefix, and describes
    the next token on both sides. The published code's one-hot rows name the token just read where
    the target is to say the next.
    """
    if pairs is None:
        pairs = boundary_pairs(source, block)
    length = sum(len(piece.ids) for piece in block)
    target, rows = pairs.T
    p = np.exp(source.logprobs[rows])
    if temperature != 1:
        unknown = vocabulary_map.shape[0] - source.ids.shape[1]
        p = _soften(p, np.exp(source.log_tail[rows]), temperature, unknown)
    if collision == "first@reference":
        p = np.where(_repeated(vocabulary_map, source.ids[rows]), 0.0, p)
    indptr = np.zeros(length + 1, dtype=np.int64)
    indptr[target + 1] = source.ids.shape[1]
    native = sparse.csr_array(
        (p.ravel(), source.ids[rows].ravel(), np.cumsum(indptr)),
        shape=(length, vocabulary_map.shape[0]),
    )
    found = native @ vocabulary_map
    if tail == "renormalise@reference":
        total = row_sums(found, found.data)
        found = scaled(found, 1 / np.where(total > 0, total, 1.0))
    covered = np.zeros(length, dtype=bool)
    covered[target] = True
    if unaligned != "mask":
        found, covered = _with_one_hot(found, covered, block, own=unaligned == "one_hot@reference")
    return Aligned(found, covered)


def boundary_pairs(source: Distribution, block: Sequence[Piece]) -> np.ndarray:
    """Positions of a block (P, 2) where target and source have read the same bytes.

    The last position of a piece is in no pair: nothing follows it.
    """
    pairs = []
    offset = 0
    for number, piece in enumerate(block):
        at = np.flatnonzero(source.pieces == number)
        pair = align_boundaries(piece.ends, source.ends[at])
        pair = pair[pair[:, 0] < len(piece.ids) - 1]
        pairs.append(np.stack([pair[:, 0] + offset, at[pair[:, 1]]], axis=1))
        offset += len(piece.ids)
    return np.concatenate(pairs)


def dtw_pairs(
    block: Sequence[Piece],
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    vocabulary_map: sparse.csr_array,
    template: str = "own",
) -> np.ndarray:
    """Positions of a block (P, 2) that the published code pairs, row for row.

    A target token that dynamic time warping gives one partner, and whose partner the vocabulary map
    sends to it; the row of the partner then stands at the target token. Where a byte-level source
    meets a SentencePiece target, the source's first token counts as if a space stood before it.

    FuseLLM (2401.10491, section 3.2 and its released code). Relative to the released code: that
    reads without BOS; here a BOS meets a BOS and is not warped. Of a conversation each answer is
    warped by itself, where FuseChat's code warps prompts and padding with it.
    """
    images = _images(vocabulary_map)
    markers = space_marker(target_tokenizer), space_marker(source_tokenizer)
    dummy = family(source_tokenizer) == "byte_level" and markers[0] == MARKERS[0]
    pairs: list[tuple[int, int]] = []
    for target, source, ours, theirs in _runs(block, source_tokenizer, target_tokenizer, template):
        if len(target) > len(ours) and len(source) > len(theirs):
            pairs.append((int(target[0]), int(source[0])))
        target, source = target[len(target) - len(ours) :], source[len(source) - len(theirs) :]
        names = target_tokenizer.convert_ids_to_tokens(ours.tolist())
        partners = source_tokenizer.convert_ids_to_tokens(theirs.tolist())
        warped = align_dtw(names, partners, target_marker=markers[0], source_marker=markers[1])
        for t, found in enumerate(warped):
            if len(found) != 1:
                continue
            s = found[0]
            same = images[theirs[s]] == ours[t]
            if t == 0 and dummy and names[0].startswith(markers[0]):
                spaced = markers[1] + partners[s].removeprefix(markers[1])
                known = source_tokenizer.get_vocab().get(spaced, -1)
                same = spaced.replace(markers[1], markers[0]) == names[0] or (
                    known >= 0 and images[known] == ours[0]
                )
            if same:
                pairs.append((int(target[t]), int(source[s])))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _runs(
    block: Sequence[Piece],
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    template: str,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """What is warped by itself: rows of target and source, and the ids, without what is in front.

    In front is the BOS of a text, or the last token of a prompt.
    """
    at_target = at_source = 0
    for piece in block:
        whole, ends = read_piece(source_tokenizer, piece, template)
        rows = at_source + np.cumsum(ends >= 0) - 1
        if piece.messages:
            runs = zip(_answers(piece.ends), _answers(ends), strict=True)
            for ours, theirs in runs:
                yield at_target + ours, rows[theirs], piece.ids[ours[1:]], whole[theirs[1:]]
        else:
            own = _without_bos(target_tokenizer, piece.ids)
            other = _without_bos(source_tokenizer, whole)
            yield at_target + np.arange(len(piece.ids)), rows, own, other
        at_target += len(piece.ids)
        at_source = int(rows[-1]) + 1


def _answers(ends: np.ndarray) -> list[np.ndarray]:
    """Positions of each answer of a conversation, the last of its prompt in front."""
    placed = np.flatnonzero(ends >= 0)
    starts = np.flatnonzero(~learned(ends)[placed])
    return np.split(placed, starts[1:])


def _without_bos(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> np.ndarray:
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and len(ids) and ids[0] == bos else ids


def _images(vocabulary_map: sparse.csr_array) -> np.ndarray:
    """The one image of each source token, (U,); −1 for none."""
    images = np.full(vocabulary_map.shape[0], -1, dtype=np.int64)
    has = np.diff(vocabulary_map.indptr) > 0
    images[has] = vocabulary_map.indices[vocabulary_map.indptr[:-1][has]]
    return images


def _repeated(vocabulary_map: sparse.csr_array, ids: np.ndarray) -> np.ndarray:
    """Which entries (P, K) have the image of a likelier entry of their row."""
    images = _images(vocabulary_map)[ids]
    order = np.argsort(images, axis=1, kind="stable")
    ordered = np.take_along_axis(images, order, axis=1)
    later = np.zeros(images.shape, dtype=bool)
    later[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    out = np.empty_like(later)
    np.put_along_axis(out, order, later, axis=1)
    return out


def _soften(p: np.ndarray, tail: np.ndarray, temperature: float, unknown: int) -> np.ndarray:
    """p^(1/T), normalised with a tail of `unknown` tokens that share it evenly."""
    share = np.maximum(tail / max(unknown, 1), np.finfo(np.float64).tiny)
    softened = p ** (1 / temperature)
    rest = unknown * share ** (1 / temperature)
    return softened / (softened.sum(axis=1) + rest)[:, None]


def _with_one_hot(
    rows: sparse.csr_array, covered: np.ndarray, block: Sequence[Piece], own: bool
) -> tuple[sparse.csr_array, np.ndarray]:
    """Certainty of one token wherever nothing is said: its own token, or the one that follows."""
    ids = np.concatenate([piece.ids for piece in block])
    says = ~covered
    if not own:
        ids = np.roll(ids, -1)
        says[np.cumsum([len(piece.ids) for piece in block]) - 1] = False
    at = np.flatnonzero(says)
    one_hot = sparse.csr_array((np.ones(len(at)), (at, ids[at])), shape=rows.shape)
    return rows + one_hot, covered | says
