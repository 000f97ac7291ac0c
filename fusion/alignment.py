"""Pair the positions of two tokenizations of one text.

Two positions correspond when both tokenizers have read the same bytes: same prefix, same context,
so both models predict the same continuation. That takes two sorted lists of byte ends and linear
time. The paper's alignment by dynamic time warping is here for parity.

Shapes: T target tokens, S source tokens, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MARKERS = ("\u2581", "\u0120")  # how SentencePiece and byte-level tokenizers write a space


def align_boundaries(target_ends: np.ndarray, source_ends: np.ndarray) -> np.ndarray:
    """Indices (P, 2) of target and source positions whose byte ends coincide, ascending.

    Ends must not decrease. Where several tokens end at one place (tokens without width), the last
    of them counts on either side, since it has read most.

    Relative to the paper: FuseLLM (2401.10491, section 3.2) pairs tokens by dynamic time warping
    over edit distances, in quadratic time, and can pair tokens that share no byte.
    """
    target, source = np.asarray(target_ends), np.asarray(source_ends)
    last_target = np.flatnonzero(np.append(target[1:] != target[:-1], True)[: len(target)])
    last_source = np.flatnonzero(np.append(source[1:] != source[:-1], True)[: len(source)])
    ours, theirs = target[last_target], source[last_source]
    found = np.minimum(np.searchsorted(theirs, ours), max(len(theirs) - 1, 0))
    shared = theirs[found] == ours if len(theirs) else np.zeros(len(ours), dtype=bool)
    return np.stack([last_target[shared], last_source[found[shared]]], axis=1)


def kinds(target_ends: np.ndarray, source_ends: np.ndarray) -> dict[str, int]:
    """How many target tokens lie in which kind of group between neighbouring common ends.

    Keys: one-to-one, one-to-many (one target token, several of the source), many-to-one,
    many-to-many, unmatched (after the last common end).
    """
    pairs = align_boundaries(target_ends, source_ends)
    steps = np.diff(np.concatenate([[[-1, -1]], pairs]), axis=0)
    wide, narrow = steps[:, 0] > 1, steps[:, 1] > 1
    count = steps[:, 0]
    matched = int(count.sum())
    return {
        "one-to-one": int(count[~wide & ~narrow].sum()),
        "one-to-many": int(count[~wide & narrow].sum()),
        "many-to-one": int(count[wide & ~narrow].sum()),
        "many-to-many": int(count[wide & narrow].sum()),
        "unmatched": len(target_ends) - matched,
    }


def align_dtw(
    target_tokens: Sequence[str],
    source_tokens: Sequence[str],
    *,
    target_marker: str | None = None,
    source_marker: str | None = None,
) -> list[list[int]]:
    r"""The source positions that dynamic time warping pairs with each target token, ascending.

        D[s, t] = lev(s, t) + min(D[s−1, t−1], D[s−1, t], D[s, t−1])

    lev is the Levenshtein distance of the token strings without their side's space marker; on the
    way back the first minimum wins, in the order diagonal, previous source token, previous target
    token. Markers are told from the tokens if they are not given. Quadratic in time and memory.

    FuseLLM (2401.10491, section 3.2 and its released code). Relative to the paper: none; for what
    it gets wrong, pairs of tokens that share no byte, see `align_boundaries`.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    if not target_tokens or not source_tokens:
        return [[] for _ in target_tokens]
    target = _bare(target_tokens, target_marker)
    source = _bare(source_tokens, source_marker)
    cost = cdist(source, target, scorer=Levenshtein.distance, dtype=np.int32).astype(np.int64)
    reached = _accumulate(cost)
    pairs: list[list[int]] = [[] for _ in target]
    s, t = len(source) - 1, len(target) - 1
    while True:
        pairs[t].append(s)
        if s == 0 and t == 0:
            return [sorted(found) for found in pairs]
        # Row and column 0 of `reached` stand for nothing read, at infinite cost.
        steps = (reached[s, t], reached[s, t + 1], reached[s + 1, t])
        best = steps.index(min(steps))
        s -= best in (0, 1)
        t -= best in (0, 2)


def _bare(tokens: Sequence[str], marker: str | None) -> list[str]:
    if marker is None:
        marker = next((m for m in MARKERS if any(m in token for token in tokens)), "")
    return [token.replace(marker, "") if marker else token for token in tokens]


def _accumulate(cost: np.ndarray) -> np.ndarray:
    """Cheapest cost to each cell, (S + 1, T + 1), one anti-diagonal after the other."""
    rows, columns = cost.shape
    far = np.iinfo(np.int64).max // 2
    reached = np.full((rows + 1, columns + 1), far)
    reached[0, 0] = 0
    for diagonal in range(rows + columns - 1):
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        before = np.minimum(reached[i, j], np.minimum(reached[i, j + 1], reached[i + 1, j]))
        reached[i + 1, j + 1] = cost[i, j] + before
    return reached
