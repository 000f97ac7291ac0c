"""How well sources predict a block, which is what fusion functions choose and weigh by.

Shapes: T target positions of a block, M sources. Levels: the whole block (M,), or for every
position the document (a piece of the block) or the span that its next token belongs to (M, T). A
span is what lies between neighbouring byte positions where the target's and all sources' tokens
end: the least that can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import numpy as np

from fusion.codec import Distribution
from fusion.corpus import Piece

LN2 = float(np.log(2))


def bits_per_byte(
    sources: Sequence[Distribution], block: Sequence[Piece], level: str = "block"
) -> np.ndarray:
    r"""Each source's −Σ log p(gold) / (bytes · ln 2) over a block, document or span.

    Comparable across tokenizers, which nats per token is not. A first token without BOS in front is
    predicted by nobody and its bytes do not count.
    """
    if level == "span":
        return _spans(sources, block)
    nats, sizes = [], []
    for source in sources:
        totals = [(-np.nansum(gold), size) for gold, size, _ in _pieces(source, block)]
        nats.append([total for total, _ in totals])
        sizes.append([size for _, size in totals])
    return _over(level, np.array(nats), np.array(sizes), block) / LN2


def nats_per_token(
    sources: Sequence[Distribution], block: Sequence[Piece], level: str = "block"
) -> np.ndarray:
    r"""Each source's mean cross-entropy a token, as the published code compares sources.

        CE_piece = −mean_s log p(gold[s]),   CE_block = Σ n_piece CE_piece / Σ n_piece

    n_piece counts the target's tokens. FuseLLM's released code (sequence and packing metrics).
    Relative to the paper: a finer tokenizer has the lower figure for the same text.
    """
    counts = np.array([len(piece.ids) for piece in block], dtype=np.float64)
    means = []
    for source in sources:
        golds = [gold[~np.isnan(gold)] for gold, _, _ in _pieces(source, block)]
        means.append([-gold.mean() if len(gold) else 0.0 for gold in golds])
    return _over(level, np.array(means) * counts, np.tile(counts, (len(sources), 1)), block)


def _pieces(
    source: Distribution, block: Sequence[Piece]
) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
    """Of each piece: gold log-probabilities, how many bytes are predicted, byte ends."""
    for number, piece in enumerate(block):
        at = source.pieces == number
        ends = source.ends[at]
        size = len(piece.text.encode()) - (int(ends[0]) if len(ends) else 0)
        yield source.gold_logprob[at], size, ends


def _over(level: str, sums: np.ndarray, counts: np.ndarray, block: Sequence[Piece]) -> np.ndarray:
    """Means of sums by piece (M, pieces): over all pieces, or for every position its piece's."""
    if level == "block":
        return sums.sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
    return np.repeat(sums / np.maximum(counts, 1), [len(piece.ids) for piece in block], axis=1)


def _spans(sources: Sequence[Distribution], block: Sequence[Piece]) -> np.ndarray:
    columns = []
    for piece, *read in zip(block, *(_pieces(source, block) for source in sources), strict=True):
        ends = [piece.ends, *(own for _, _, own in read)]
        # A piece ends where it ends, also for a tokenizer whose spans are not exactly known.
        common = np.union1d(reduce(np.intersect1d, ends), piece.ends[-1:])
        sizes = np.maximum(np.diff(common, prepend=0), 1)
        # What follows a position lies in the span after the last common end that it has reached.
        following = np.searchsorted(common, piece.ends, side="right")
        bits = []
        for gold, _, own in read:
            belongs = np.searchsorted(common, own[1:])
            said = np.nan_to_num(gold[:-1])
            total = np.bincount(belongs, -said, len(common) + 1)[: len(common)]
            bits.append((total / sizes / LN2)[np.minimum(following, len(common) - 1)])
        columns.append(np.array(bits))
    return np.concatenate(columns, axis=1)


def chunks(source: Distribution, block: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Runs of text between neighbouring byte ends that target and source share.

    For each target position the chunk of its next token, −1 for none, (T,); and the source's
    log-likelihood of each chunk, in nats, (C,). What comes before the first shared end is in none:
    one side or the other does not predict all of it.
    """
    index: list[np.ndarray] = []
    likelihoods: list[np.ndarray] = [np.zeros(0)]
    count = 0
    for piece, (gold, _, own) in zip(block, _pieces(source, block), strict=True):
        common = np.intersect1d(piece.ends, own)
        many = max(0, len(common) - 1)
        ours = np.full(len(piece.ids), -1, dtype=np.int64)
        ours[:-1] = _between(common, piece.ends[1:])
        index.append(np.where(ours >= 0, ours + count, -1))
        theirs = _between(common, own[1:])
        inside = theirs >= 0
        # Between two answers of a conversation nothing is predicted; nothing learns from it either.
        said = np.nan_to_num(gold[:-1])
        likelihoods.append(np.bincount(theirs[inside], said[inside], many))
        count += many
    return np.concatenate(index), np.concatenate(likelihoods)


def _between(common: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which run between neighbouring common ends each token closes in or lies in; −1 for none."""
    at = np.searchsorted(common, ends) - 1
    return np.where((at >= 0) & (at < len(common) - 1), at, -1)


MEASURES: dict[str, Callable[..., np.ndarray]] = {
    "bits_per_byte": bits_per_byte,
    "nats_per_token": nats_per_token,
}
