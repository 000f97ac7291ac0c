"""Boundary alignment is exact; the paper's alignment is the published code's, pair for pair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusion.alignment import align_boundaries, align_dtw, kinds

WIDTHS = st.lists(st.integers(0, 4), min_size=1, max_size=30)
TOKENS = st.lists(st.text("ab\u2581", max_size=3), min_size=1, max_size=8)


def recorded(shared: Path) -> list[dict]:
    lines = (shared / "golden" / "alignment.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_dynamic_time_warping_is_the_published_codes(shared: Path) -> None:
    compared = 0
    for record in recorded(shared):
        found = align_dtw(record["base_tokens"], record["blending_tokens"])
        if record["dtw"] is None:  # the published code fails on an empty text
            assert found == []
            continue
        assert found == record["dtw"]["base_to_blending"], record["id"]
        compared += 1
    assert compared == 224


def test_boundaries_are_the_recorded_ones(shared: Path) -> None:
    for record in recorded(shared):
        ends = np.array(record["base_byte_ends"]), np.array(record["blending_byte_ends"])
        pairs = align_boundaries(*ends)
        at = [int(ends[0][t]) for t in pairs[:, 0]] if len(pairs) else []
        assert [end for end in at if end] == record["common_boundaries"]


@given(WIDTHS, WIDTHS)
def test_every_pair_ends_at_one_byte_and_none_is_missed(one: list[int], other: list[int]) -> None:
    target, source = np.cumsum(one), np.cumsum(other)
    pairs = align_boundaries(target, source)
    assert (target[pairs[:, 0]] == source[pairs[:, 1]]).all()
    assert (np.diff(pairs, axis=0) > 0).all()
    assert sorted(set(target) & set(source)) == target[pairs[:, 0]].tolist()
    assert sum(kinds(target, source).values()) == len(target)


def slow_cost(target: list[str], source: list[str]) -> int:
    """The cheapest path, by the recurrence as it is written."""
    from rapidfuzz.distance import Levenshtein

    best: dict[tuple[int, int], int] = {}
    for s, left in enumerate(source):
        for t, right in enumerate(target):
            before = [best[p] for p in ((s - 1, t - 1), (s - 1, t), (s, t - 1)) if p in best]
            best[s, t] = Levenshtein.distance(left, right) + min(before, default=0)
    return best[len(source) - 1, len(target) - 1]


@given(TOKENS, TOKENS)
def test_a_warping_path_is_whole_and_cheapest(target: list[str], source: list[str]) -> None:
    from rapidfuzz.distance import Levenshtein

    found = align_dtw(target, source)
    pairs = sorted((s, t) for t, positions in enumerate(found) for s in positions)
    assert pairs[0] == (0, 0)
    assert pairs[-1] == (len(source) - 1, len(target) - 1)
    bare = [[token.replace("\u2581", "") for token in side] for side in (target, source)]
    cost = sum(Levenshtein.distance(bare[1][s], bare[0][t]) for s, t in pairs)
    assert cost == slow_cost(*bare)


def test_texts_that_share_no_boundary_inside() -> None:
    assert kinds(np.array([3]), np.array([1, 2, 3]))["one-to-many"] == 1
    assert kinds(np.array([1, 2, 3]), np.array([3]))["many-to-one"] == 3
    assert kinds(np.array([2, 5]), np.array([3]))["unmatched"] == 2
