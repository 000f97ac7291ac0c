"""Sums over what members of an ensemble say: chunks of a text, whole choices, votes, the prompt.

Plain functions of log-probabilities and byte ends. A chunk lies between two byte positions where
tokens of all members end, so its probability is of the same bytes for all.

Shapes: M members, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mixture(logprobs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Natural log of Σ_j w_j exp(logprobs[j]) along the first axis.

    Members without weight are left out, so that one that is all is given back bit for bit.
    """
    some = np.flatnonzero(weights)
    if len(some) == 1:
        return logprobs[some[0]] + np.log(weights[some[0]])
    logprobs, w = logprobs[some], weights[some]
    most = logprobs.max(axis=0)
    safe = np.where(np.isfinite(most), most, 0.0)
    w = w.reshape(-1, *[1] * (logprobs.ndim - 1))
    with np.errstate(divide="ignore"):
        return most + np.log((w * np.exp(logprobs - safe)).sum(axis=0))


def common_ends(ends: Sequence[np.ndarray]) -> np.ndarray:
    """Byte positions where a token of every member ends, ascending."""
    common = set(ends[0].tolist())
    for other in ends[1:]:
        common &= set(other.tolist())
    return np.array(sorted(common), dtype=np.int64)


def chunks(
    logprobs: Sequence[np.ndarray], ends: Sequence[np.ndarray], borders: np.ndarray
) -> np.ndarray:
    """Log-probabilities (M, C) of what lies between borders; the last chunk runs to the end.

    logprobs, ends: for each member its tokens' log-probabilities and byte ends.
    """
    parts = []
    for logprob, end in zip(logprobs, ends, strict=True):
        reached = np.concatenate([[0.0], np.cumsum(logprob)])
        at = np.searchsorted(end, borders[:-1], side="right")
        parts.append(np.diff(reached[np.array([0, *at, len(logprob)], dtype=np.int64)]))
    return np.stack(parts)


def mix_chunks(
    logprobs: Sequence[np.ndarray], ends: Sequence[np.ndarray], weights: np.ndarray
) -> float:
    r"""Log-probability of a text under the mixture, chunk by chunk.

        log P = Σ_c log Σ_j w_j exp(Σ_{t in c} log p_j,t)

    logprobs, ends: for each member its tokens' log-probabilities and byte ends. A chunk ends where
    a token of every member ends; without one, the whole text is one chunk.
    """
    some = np.flatnonzero(weights).tolist()
    if len(some) == 1:
        return float(logprobs[some[0]].sum() + np.log(weights[some[0]]))
    logprobs, ends = [logprobs[j] for j in some], [ends[j] for j in some]
    return float(mixture(chunks(logprobs, ends, common_ends(ends)), weights[some]).sum())


def evidence(
    logprobs: Sequence[np.ndarray], ends: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Bits per byte (M,) and chunks (M, C) of a prompt, on the bytes that all members predict.

    logprobs: of each member's last tokens of the prompt; what was cut from its left, or comes first
    and nothing predicts it, has none and counts for no member. ends: of all the prompt's tokens.
    Zeros and no chunk where no bytes are left, as for an empty prompt.
    """
    none = np.zeros(len(logprobs)), np.zeros((len(logprobs), 0))
    if not all(len(end) for end in ends):
        return none
    logprobs = [x[max(0, len(x) - len(end)) :] for x, end in zip(logprobs, ends, strict=True)]
    missing = [len(end) - len(x) for x, end in zip(logprobs, ends, strict=True)]
    known = [int(end[n - 1]) if n else 0 for n, end in zip(missing, ends, strict=True)]
    common = common_ends(ends)
    begins = [0, *common.tolist()] if max(known) == 0 else common.tolist()
    begins = [at for at in begins if at >= max(known)]
    borders = common[common > begins[0]] if begins else common[:0]
    if not len(borders):
        return none
    cut = [
        int(np.searchsorted(end[n:], begins[0], side="right")) if begins[0] else 0
        for n, end in zip(missing, ends, strict=True)
    ]
    parts = chunks(
        [x[c:] for x, c in zip(logprobs, cut, strict=True)],
        [end[n + c :] for n, c, end in zip(missing, cut, ends, strict=True)],
        borders,
    )
    return -parts.sum(axis=1) / (np.log(2) * (borders[-1] - begins[0])), parts


def vote(totals: np.ndarray, weights: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Weights (M,) of the members that voted for the winner; they sum to one.

    totals: (choices, M), log-likelihoods. Each member votes for its likeliest choice, the first of
    equals. Where votes are level, the choice wins that its voters find likeliest, per byte of
    `sizes`; then the first.
    """
    votes = totals.argmax(axis=0)
    best: tuple[float, float] | None = None
    out = weights
    for choice in range(len(totals)):
        w = np.where(votes == choice, weights, 0.0)
        share = float(w.sum())
        if not share:
            continue
        found = float(mixture(totals[choice], w / share)) / max(1, sizes[choice])
        if (
            best is None
            or (share - best[0] > 1e-9)
            or (abs(share - best[0]) <= 1e-9 and found > best[1])
        ):
            best, out = (share, found), w / share
    return out
