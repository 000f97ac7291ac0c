"""Pair the positions of two tokenizations of one text.

Two positions correspond when both tokenizers have read the same bytes: same prefix, same context,
so
both models predict the same continuation. That takes two sorted lists of byte ends and linear time.

Shapes: T target tokens, S source tokens, P pairs.
"""

from __future__ import annotations

import numpy as np


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
    _, at_target, at_source = np.intersect1d(
        target[last_target], source[last_source], assume_unique=True, return_indices=True
    )
    return np.stack([last_target[at_target], last_source[at_source]], axis=1)


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
