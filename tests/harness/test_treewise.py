"""Segments of whole texts, in windows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.treewise import SEGMENT, segments

RULES = [None, {"window": 400, "stride": 200}, {"window": 64, "stride": 32}]


@pytest.mark.parametrize("rule", RULES)
@given(part=st.text("aé漢😀 ", max_size=20), times=st.integers(1, 45))
def test_every_byte_counts_once_behind_what_the_window_allows(
    rule: dict[str, int] | None, part: str, times: int
) -> None:
    text = part * times
    found = segments(text, rule)
    assert "".join(text[start:end] for _, start, end in found) == text
    for first, start, end in found:
        assert first <= start < end
        assert len(text[start:end].encode()) < SEGMENT + 4
        if rule is None:
            assert first == 0
        else:
            assert len(text[first:end].encode()) <= rule["window"] + 3
            if first:
                least = rule["window"] - rule["stride"] - 8  # a character on either side
                assert len(text[first:start].encode()) >= least
