"""Fusion functions: combine the aligned distributions of several sources into one.

A fusion function is a plain function of (sources, bits_per_byte) and its line in FUSION_FUNCTIONS
at the foot; further keyword parameters can be given in a recipe. Distributions are sparse rows over
the target's vocabulary, so nothing here is dense, and any number of sources goes in by list.

Shapes: T target positions of a block, V target vocabulary, M sources.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from fusion.alignment import align_boundaries
from fusion.corpus import Piece
from fusion.distributions import Distribution


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
        return np.clip(1.0 - self.probabilities.sum(axis=1), 0.0, 1.0)


def align(
    source: Distribution, block: Sequence[Piece], vocabulary_map: sparse.csr_array
) -> Aligned:
    r"""Carry a source's distributions to the target's positions and vocabulary.

        P[t] = Aᵀ p[s]    where target position t and source position s have read the same bytes

    vocabulary_map: A, csr (U, V), rows sum to at most 1. Mass without an image becomes tail. A
    position where no source token ends stays uncovered, and so does the last of each piece.

    Relative to the paper: FuseLLM pairs tokens by edit distance and hands the row of a token to its
    partner; here a row moves only between positions with the same prefix, and describes the next
    token on both sides.
    """
    length = sum(len(piece.ids) for piece in block)
    kept = source.ids.shape[1]
    pairs = []
    offset = 0
    for number, piece in enumerate(block):
        at = np.flatnonzero(source.pieces == number)
        pair = align_boundaries(piece.ends, source.ends[at])
        pair = pair[pair[:, 0] < len(piece.ids) - 1]
        pairs.append(np.stack([pair[:, 0] + offset, at[pair[:, 1]]], axis=1))
        offset += len(piece.ids)
    target, rows = np.concatenate(pairs).T
    p = np.exp(source.logprobs[rows])
    indptr = np.zeros(length + 1, dtype=np.int64)
    indptr[target + 1] = kept
    native = sparse.csr_array(
        (p.ravel(), source.ids[rows].ravel(), np.cumsum(indptr)),
        shape=(length, vocabulary_map.shape[0]),
    )
    covered = np.zeros(length, dtype=bool)
    covered[target] = True
    return Aligned(sparse.csr_array(native @ vocabulary_map), covered)


def bits_per_byte(source: Distribution, block: Sequence[Piece]) -> float:
    r"""How well a source predicts a block's text: −Σ log p(gold) / (bytes · ln 2).

    Comparable across tokenizers, which nats per token is not. A first token without BOS in front is
    predicted by nobody and its bytes do not count.
    """
    total = 0
    for number, piece in enumerate(block):
        ends = source.ends[source.pieces == number]
        total += len(piece.text.encode()) - (int(ends[0]) if len(ends) else 0)
    return float(-np.nansum(source.gold_logprob) / (max(total, 1) * np.log(2)))


def _mix(sources: Sequence[Aligned], weights_MT: np.ndarray) -> Aligned:
    mixed = sum(
        (sparse.diags_array(w) @ s.probabilities for w, s in zip(weights_MT, sources, strict=True)),
        start=sparse.csr_array(sources[0].probabilities.shape),
    )
    return Aligned(sparse.csr_array(mixed), weights_MT.sum(axis=0) > 0)


def min_ce(sources: Sequence[Aligned], bits_per_byte: np.ndarray) -> Aligned:
    r"""Take each block's distributions from the source that predicts the block best.

        P = P^m,   m = argmin_j bits_j

    bits_per_byte: (M,). A tie goes to the earlier source of the recipe.

    Relative to the paper (FuseLLM 2401.10491, section 3.3, MinCE): it compares cross-entropy a
    token, in bfloat16; here bits a byte in float64, since tokenizers cut text differently.
    """
    return sources[int(np.argmin(bits_per_byte))]


def avg_ce(
    sources: Sequence[Aligned], bits_per_byte: np.ndarray, *, temperature: float = 1.0
) -> Aligned:
    r"""Average the sources, weighing each by how well it predicts the block.

        P[t] = Σ_j w_j P^j[t] / Σ_{j covers t} w_j,   w = softmax(−bits / temperature)

    bits_per_byte: (M,). Sources that do not cover a position leave their weight to the others.

    Relative to the paper (FuseLLM 2401.10491, section 3.3, AvgCE): cross-entropies a byte, in bits,
    in place of nats a token; every position is renormalised over the sources that cover it.
    """
    bits = np.asarray(bits_per_byte, dtype=np.float64)
    w = np.exp(-(bits - bits.min()) / temperature)
    weights = (w / w.sum())[:, None] * np.stack([s.covered for s in sources])
    total = weights.sum(axis=0)
    return _mix(sources, weights / np.where(total > 0, total, 1.0))


def avg_entropy(
    sources: Sequence[Aligned], bits_per_byte: np.ndarray, *, temperature: float = 1.0
) -> Aligned:
    r"""Average the sources, weighing each at every position by how certain it is there.

        P[t] = Σ_j w_j[t] P^j[t],   w_j[t] ∝ exp(−H(P^j[t]) / temperature)  where j covers t

    H in nats, the tail as one outcome. Not in the paper: FuseLLM weighs whole sequences by their
    cross-entropy; this asks no gold token.
    """
    certainty = -np.stack([entropy(s) for s in sources]) / temperature
    certainty[~np.stack([s.covered for s in sources])] = -np.inf
    best = certainty.max(axis=0)
    weights = np.exp(certainty - np.where(np.isfinite(best), best, 0.0))
    total = weights.sum(axis=0)
    return _mix(sources, weights / np.where(total > 0, total, 1.0))


def min_entropy(sources: Sequence[Aligned], bits_per_byte: np.ndarray) -> Aligned:
    r"""Take every position from the source that is most certain there.

        P[t] = P^m[t],   m = argmin_j H(P^j[t])  over the sources that cover t

    A tie goes to the earlier source. Not in the paper: MinCE (FuseLLM 2401.10491, section 3.3)
    chooses one source for a whole sequence.
    """
    uncertainty = np.stack([np.where(s.covered, entropy(s), np.inf) for s in sources])
    chosen = np.arange(len(sources))[:, None] == uncertainty.argmin(axis=0)
    return _mix(sources, (chosen & np.isfinite(uncertainty)).astype(np.float64))


def log_linear(sources: Sequence[Aligned], bits_per_byte: np.ndarray) -> Aligned:
    r"""The normalised geometric mean: a source that holds a token impossible vetoes it.

        P[t, v] ∝ Π_j P^j[t, v]^(1/n)    over the n sources that cover t

    A token that a source does not keep has an equal share of its tail. Logarithmic pooling, that is
    the mean of logits up to a constant; not in the paper, whose AvgCE is a mean of probabilities.
    """
    width = sources[0].probabilities.shape[1]
    covered = np.stack([s.covered for s in sources])
    share = covered / np.maximum(covered.sum(axis=0), 1)
    union = _mix(sources, np.ones(covered.shape)).probabilities
    union.sort_indices()
    counts = np.diff(union.indptr)
    rows = np.repeat(np.arange(union.shape[0]), counts)
    keys = rows * width + union.indices
    logs, rest = np.zeros(union.nnz), np.zeros(union.shape[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        for source, weight in zip(sources, share, strict=True):
            kept = (source.probabilities > 0).sum(axis=1)
            spread = source.tail / np.maximum(width - kept, 1)
            found = np.zeros(union.nnz)
            entries = source.probabilities.tocoo()
            some = entries.data > 0  # exp underflows to 0 below −745 nats
            place = np.searchsorted(keys, (entries.row * width + entries.col)[some])
            np.add.at(found, place, entries.data[some])
            logs += _weighted(weight[rows], np.log(np.where(found > 0, found, spread[rows])))
            rest += _weighted(weight, np.log(spread))
        mass = np.exp(logs)
        total = np.bincount(rows, mass, len(rest)) + (width - counts) * np.exp(rest)
    union.data = mass / np.where(total > 0, total, 1.0)[rows]
    says = covered.any(axis=0) & (total > 0)
    return Aligned(sparse.csr_array(sparse.diags_array(says.astype(float)) @ union), says)


def entropy(source: Aligned) -> np.ndarray:
    """Entropy of each row in nats, (T,), its tail counted as one outcome."""
    p = source.probabilities
    plogp = sparse.csr_array((_plogp(p.data), p.indices, p.indptr), shape=p.shape)
    return -(plogp.sum(axis=1) + _plogp(source.tail))


def _plogp(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1.0))


def _weighted(weight: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """weight · logs, where no weight is no say, even about what is impossible."""
    return np.where(weight > 0, weight * logs, 0.0)


def fused_block(
    function: str,
    sources: Sequence[Distribution],
    maps: Sequence[sparse.csr_array],
    block: Sequence[Piece],
    parameters: dict[str, float],
) -> tuple[Aligned, np.ndarray]:
    """The fused targets of one block, and each source's bits per byte on it, (M,)."""
    bits = np.array([bits_per_byte(source, block) for source in sources])
    aligned = [align(s, block, a) for s, a in zip(sources, maps, strict=True)]
    return FUSION_FUNCTIONS[function](aligned, bits, **parameters), bits


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """What a recipe may set for a fusion function: its keyword-only parameters."""
    found = inspect.signature(FUSION_FUNCTIONS[name]).parameters
    return {key: p for key, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


FUSION_FUNCTIONS: dict[str, Callable[..., Aligned]] = {
    "min_ce": min_ce,
    "avg_ce": avg_ce,
    "avg_entropy": avg_entropy,
    "min_entropy": min_entropy,
    "log_linear": log_linear,
}
