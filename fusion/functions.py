"""Fusion functions: combine the aligned distributions of several sources into one.

A fusion function is a plain function of (sources, losses) and its line in FUSION_FUNCTIONS at the
foot; its second parameter is called `bits_per_byte` or `nats_per_token`, which is what it is then
given, and further keyword parameters can be given in a recipe. Distributions are sparse rows over
the target's vocabulary, so nothing here is dense, and any number of sources goes in by list.

Shapes: T target positions of a block, V target vocabulary, M sources. Losses are (M,), of the whole
block, or (M, T), of the document or span that a position's next token belongs to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy import sparse

from fusion.aligned import Aligned, align, row_sums, scaled
from fusion.codec import Distribution
from fusion.corpus import Piece
from fusion.measures import MEASURES
from fusion.spec import Fuse


def _mix(sources: Sequence[Aligned], weights_MT: np.ndarray) -> Aligned:
    mixed = scaled(sources[0].probabilities, weights_MT[0])
    for source, weights_T in zip(sources[1:], weights_MT[1:], strict=True):
        mixed = mixed + scaled(source.probabilities, weights_T)
    return Aligned(mixed, weights_MT.sum(axis=0) > 0)


def min_ce(sources: Sequence[Aligned], bits_per_byte: np.ndarray) -> Aligned:
    r"""Take each block's (document's, span's) distributions from the source that predicts it best.

        P = P^m,   m = argmin_j bits_j

    bits_per_byte: (M,) or (M, T). A tie goes to the earlier source of the recipe.

    Relative to the paper (FuseLLM 2401.10491, section 3.3, MinCE): it compares cross-entropy a
    token, in bfloat16; here bits a byte in float64, since tokenizers cut text differently. Below
    the block, a source that does not cover a position leaves it to the next best.
    """
    if np.ndim(bits_per_byte) == 1:
        return sources[int(np.argmin(bits_per_byte))]
    covered = np.stack([s.covered for s in sources])
    return _chosen(sources, np.where(covered, bits_per_byte, np.inf).argmin(axis=0))


def _chosen(sources: Sequence[Aligned], index_T: np.ndarray) -> Aligned:
    covered = np.stack([s.covered for s in sources])
    taken = covered & (np.arange(len(sources))[:, None] == index_T)
    return _mix(sources, taken.astype(np.float64))


def dual_min_ce(sources: Sequence[Aligned], bits_per_byte: np.ndarray) -> Aligned:
    r"""MinCE, where another model predicts the text better than the target did; else nothing.

        P = P^m,   m = argmin_{j > 0} bits_j,   if bits_m < bits_0;   not covered otherwise

    bits_per_byte: (M,) or (M, T). The first source is the target itself as it was before training.
    What is not covered has no fusion loss: there the target learns from the text alone.

    FedMKT 2406.02224, section 3.3 (dual minimum cross-entropy): two models of unlike size each take
    from the other what the other knows better. Relative to the paper: bits a byte in place of nats
    a token; any number of others; below the block a position that the best other does not cover
    goes to the next best, as in `min_ce`.
    """
    bits = np.asarray(bits_per_byte, dtype=np.float64)
    best = min_ce(sources[1:], bits[1:])
    if bits.ndim == 1:
        better = np.full(len(best.covered), bits[1:].min() < bits[0])
    else:
        covered = np.stack([s.covered for s in sources[1:]])
        better = np.where(covered, bits[1:], np.inf).min(axis=0) < bits[0]
    taken = best.covered & better
    return Aligned(scaled(best.probabilities, taken.astype(np.float64)), taken)


def avg_ce(
    sources: Sequence[Aligned], bits_per_byte: np.ndarray, *, temperature: float = 1.0
) -> Aligned:
    r"""Average the sources, weighing each by how well it predicts the block (document, span).

        P[t] = Σ_j w_j P^j[t] / Σ_{j covers t} w_j,   w = softmax(−bits / temperature)

    bits_per_byte: (M,) or (M, T). Sources that do not cover a position leave their weight to the
    others.

    Relative to the paper (FuseLLM 2401.10491, section 3.3, AvgCE): cross-entropies a byte, in bits,
    in place of nats a token; every position is renormalised over the sources that cover it.
    """
    return _averaged(sources, softmax(-np.asarray(bits_per_byte, np.float64) / temperature))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Weights over the first axis, which is that of the sources."""
    w = np.exp(scores - scores.max(axis=0))
    return w / w.sum(axis=0)


def _averaged(sources: Sequence[Aligned], weights: np.ndarray) -> Aligned:
    """The mean at every position over the sources that cover it; weights (M,) or (M, T)."""
    covered = np.stack([s.covered for s in sources])
    weights = (weights[:, None] if weights.ndim == 1 else weights) * covered
    total = weights.sum(axis=0)
    return _mix(sources, weights / np.where(total > 0, total, 1.0))


def min_ce_reference(
    sources: Sequence[Aligned],
    nats_per_token: np.ndarray,
    *,
    base_is_candidate: bool = True,
    bfloat16: bool = True,
) -> Aligned:
    r"""MinCE as the published code has it.

        P = P^m,   m = argmax_j r_j,   r = 1 / exp(CE)     (bfloat16)

    nats_per_token: CE, (M,) or (M, T), incomparable across tokenizers. The first source is the
    target's own model: its rows stand in for empty ones; with `base_is_candidate: false` it is not
    chosen itself, and the last of equals wins instead of the first.

    FuseLLM's released code (`distill_greater_as_gt`). Relative to the paper: rounding to bfloat16
    makes ties, which fall to the target itself.
    """
    rewards = _rewards(nats_per_token, bfloat16)
    if base_is_candidate:
        chosen = rewards.argmax(axis=0)
    else:
        chosen = len(rewards) - 1 - rewards[:0:-1].argmax(axis=0)
    filled = _filled(sources)
    if rewards.ndim == 1:
        return filled[int(chosen)]
    return _chosen(filled, chosen)


def avg_ce_reference(
    sources: Sequence[Aligned],
    nats_per_token: np.ndarray,
    *,
    base_is_candidate: bool = True,
    bfloat16: bool = True,
) -> Aligned:
    r"""AvgCE as the published code has it.

        P = Σ_j w_j P^j,   w = softmax(r),   r = 1 / exp(CE)     (bfloat16)

    nats_per_token: CE, (M,) or (M, T). The first source as in `min_ce@reference`.

    FuseLLM's released code (`distill_weighted_as_gt`). Relative to the paper: softmax(−CE) is
    meant; a softmax over rewards between 0 and 1 is nearly uniform.
    """
    rewards = _rewards(nats_per_token, bfloat16)
    filled = _filled(sources)
    if not base_is_candidate:
        rewards, filled = rewards[1:], filled[1:]
    weights = softmax(rewards)
    if bfloat16:
        weights = torch.softmax(torch.from_numpy(rewards).bfloat16(), 0).double().numpy()
    return _averaged(filled, weights)


def _rewards(nats_per_token: np.ndarray, bfloat16: bool) -> np.ndarray:
    losses = torch.from_numpy(np.asarray(nats_per_token, np.float64))
    return (1 / torch.exp(losses.bfloat16() if bfloat16 else losses)).double().numpy()


def _filled(sources: Sequence[Aligned]) -> list[Aligned]:
    """Rows that are covered but empty (nothing of theirs has an image) are the first source's."""
    filled = []
    for source in sources:
        empty = source.covered & (source.tail == 1)
        if empty.any():
            own = scaled(sources[0].probabilities, empty.astype(float))
            source = Aligned(source.probabilities + own, source.covered)
        filled.append(source)
    return filled


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

    A tie goes to the earlier source. Not in the paper, whose MinCE chooses one source for a whole
    sequence.
    """
    uncertainty = np.stack([np.where(s.covered, entropy(s), np.inf) for s in sources])
    return _chosen(sources, uncertainty.argmin(axis=0))


def log_linear(sources: Sequence[Aligned], bits_per_byte: np.ndarray) -> Aligned:
    r"""The normalised geometric mean: a source that holds a token impossible vetoes it.

        P[t, v] ∝ Π_j P^j[t, v]^(1/n)    over the n sources that cover t

    A token that a source does not keep has an equal share of its tail. Logarithmic pooling, that is
    the mean of logits up to a constant; not in the paper, whose AvgCE is a mean of probabilities.
    """
    width = sources[0].probabilities.shape[1]
    covered = np.stack([s.covered for s in sources])
    share = covered / np.maximum(covered.sum(axis=0), 1)
    entries = [_entries(source) for source in sources]
    keys, place = np.unique(np.concatenate([key for key, _ in entries]), return_inverse=True)
    places = np.split(place, np.cumsum([len(key) for key, _ in entries])[:-1])
    rows, columns = np.divmod(keys, width)
    counts = np.bincount(rows, minlength=covered.shape[1])
    logs, rest = np.zeros(len(keys)), np.zeros(len(counts))
    with np.errstate(divide="ignore", invalid="ignore"):
        for source, weight, (key, p), at in zip(sources, share, entries, places, strict=True):
            kept = np.bincount(key // width, minlength=len(counts))
            spread = np.log(source.tail / np.maximum(width - kept, 1))
            said = spread[rows]
            said[at] = np.log(p)
            logs += _weighted(weight[rows], said)
            rest += _weighted(weight, spread)
        mass = np.exp(logs)
        total = np.bincount(rows, mass, len(counts)) + (width - counts) * np.exp(rest)
    says = covered.any(axis=0) & (total > 0)
    mass *= (says / np.where(total > 0, total, 1.0))[rows]
    pointers = np.concatenate([[0], np.cumsum(counts)])
    return Aligned(sparse.csr_array((mass, columns, pointers), shape=(len(counts), width)), says)


def _entries(source: Aligned) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each entry as one number, and its probability where that is not nothing.

    exp underflows to 0 below −745 nats.
    """
    rows = source.probabilities
    owner = np.repeat(np.arange(rows.shape[0], dtype=np.int64), np.diff(rows.indptr))
    some = rows.data > 0
    return (owner * rows.shape[1] + rows.indices)[some], rows.data[some]


def entropy(source: Aligned) -> np.ndarray:
    """Entropy of each row in nats, (T,), its tail counted as one outcome."""
    rows = source.probabilities
    return -(row_sums(rows, _plogp(rows.data)) + _plogp(source.tail))


def _plogp(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1.0))


def _weighted(weight: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """weight · logs, where no weight is no say, even about what is impossible."""
    return np.where(weight > 0, weight * logs, 0.0)


def fused_block(
    fuse: Fuse,
    sources: Sequence[Distribution],
    maps: Sequence[sparse.csr_array],
    block: Sequence[Piece],
    pairs: Sequence[np.ndarray] | None = None,
) -> tuple[Aligned, np.ndarray]:
    """The fused targets of one block, and each source's loss on it, (M,) or (M, T).

    pairs: of each source, where they are not those of the common bytes.
    """
    function = FUSION_FUNCTIONS[fuse.function]
    losses = MEASURES[list(inspect.signature(function).parameters)[1]](sources, block, fuse.level)
    aligned = [
        align(
            source,
            block,
            vocabulary_map,
            pairs=None if pairs is None else pairs[index],
            unaligned=fuse.unaligned,
            collision=fuse.collision,
            tail=fuse.tail,
            temperature=fuse.source_temperature,
        )
        for index, (source, vocabulary_map) in enumerate(zip(sources, maps, strict=True))
    ]
    return function(aligned, losses, **typed(fuse.function, fuse.parameters)), losses


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """What a recipe may set for a fusion function: its keyword-only parameters."""
    found = inspect.signature(FUSION_FUNCTIONS[name]).parameters
    return {key: p for key, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def typed(name: str, given: Mapping[str, float | bool]) -> dict[str, float | bool]:
    """A recipe's parameters as the function declares them: an `int` is no float."""
    whole = {key for key, p in parameters(name).items() if p.annotation in (int, "int")}
    return {key: int(value) if key in whole else value for key, value in given.items()}


FUSION_FUNCTIONS: dict[str, Callable[..., Aligned]] = {
    "min_ce": min_ce,
    "dual_min_ce": dual_min_ce,
    "avg_ce": avg_ce,
    "avg_entropy": avg_entropy,
    "min_entropy": min_entropy,
    "log_linear": log_linear,
    "min_ce@reference": min_ce_reference,
    "avg_ce@reference": avg_ce_reference,
}
