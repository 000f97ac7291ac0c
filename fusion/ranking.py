"""The largest of many numbers that come in pieces: which one is the smallest that is kept, exactly.

A sample tells between which two numbers it must lie. One pass over the pieces counts what is above
and keeps what is between, a few in a hundred, among which it is found. The sample decides how much
memory that takes, never the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusion.tensors import each

if TYPE_CHECKING:  # a recipe is checked against signatures without waiting for torch
    from torch import Tensor

    from fusion.tensors import Whole

# Of the models' tensors and the base, one or more arrays to rank, each by itself: by |τ| against
# the second, or numbers ≥ 0 and None.
Ranked = tuple[np.ndarray, np.ndarray | None]
Values = Callable[[Sequence["Tensor"], Any], Sequence[Ranked]]
Keep = Callable[[int, int], int]  # how many are kept, of so many, so many of them above zero
SAMPLE = 1 << 14, 1 << 20  # numbers in a sample: at least, at most


class Least(NamedTuple):
    """The smallest number kept, and, where not all that equal it are, how many more at a piece."""

    value: float
    room: Mapping[int, int] | None = None  # by the place of the piece's first element; else all

    def of(self, start: int) -> int:
        """How many that equal it are kept of a piece, the first ones; −1: all."""
        return self.room.get(start, -1) if self.room else -1


def magnitudes(model: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    """|τ|, or the numbers themselves, which are ≥ 0, if there is no base."""
    if base is None:
        return model
    from fusion import loops

    out = np.empty_like(model)
    loops.magnitude(out, model, base)
    return out


def least_kept(whole: Whole, values: Values, keep: Keep, together: bool = False) -> list[Least]:
    """The smallest kept number of each of the values' tensors.

    Of equal ones the first are kept, for which the pieces must be of one tensor, unless `together`.
    """
    for spread in (4, 32, math.inf):
        brackets = _brackets(whole, values, keep, spread)
        counted = list(each(whole, lambda *piece: _counted(values, brackets, *piece)))  # noqa: B023
        columns = range(len(counted[0])) if counted else ()
        found = [_located([piece[c] for piece in counted], keep, together) for c in columns]
        if None not in found:
            return [one for one in found if one is not None]
    raise AssertionError("no bracket holds the smallest kept number")


def _brackets(
    whole: Whole, values: Values, keep: Keep, spread: float
) -> list[tuple[float, float]] | None:
    """Two numbers a tensor of values, by a sample; None if that would be nearly everything."""
    sample = getattr(whole, "sample", None)
    size = getattr(whole, "size", 0)
    most = min(max(size >> 5, SAMPLE[0]), SAMPLE[1])
    if sample is None or size <= 4 * most or spread == math.inf:
        return None
    parts = [
        [magnitudes(*ranked) for ranked in values(models, base)] for _, models, base in sample(most)
    ]
    out = []
    for column in zip(*parts, strict=True):
        flat = np.concatenate(column)
        place = keep(flat.size, int(np.count_nonzero(flat)))  # from the top, from 1 on
        aside = math.ceil(spread * math.sqrt(flat.size))
        low, high = flat.size - place - aside, flat.size - place + aside
        flat.partition([max(0, low), min(high, flat.size - 1)])
        least = float(flat[low]) if low >= 0 else -1.0
        out.append((least, float(flat[high]) if high < flat.size else math.inf))
    return out


class _Count(NamedTuple):
    """Of one piece of one tensor of values."""

    start: int
    size: int
    positive: int
    above: int  # the bracket
    bracket: tuple[float, float]
    at_ends: tuple[int, int]
    inside: np.ndarray


def _counted(
    values: Values,
    brackets: Sequence[tuple[float, float]] | None,
    start: int,
    _: str,
    models: Sequence[Tensor],
    base: Any,
) -> list[_Count]:
    from fusion import loops

    out = []
    for place, (value, ground) in enumerate(values(models, base)):
        if not brackets:  # all of it, what is not a number as well
            value = magnitudes(value, ground)
            positive = int(np.count_nonzero(value > 0))
            everything = (-1.0, math.inf), (0, 0), value
            out.append(_Count(start, value.size, positive, 0, *everything))
            continue
        real = value.dtype.type
        low, high = brackets[place]
        inside = np.empty(value.size + 1, value.dtype)
        positive, above, between = loops.count(value, ground, real(low), real(high), inside)
        held = inside[:between]
        at = int(np.count_nonzero(held == low)), int(np.count_nonzero(held == high))
        held = held[(held > low) & (held < high)]
        out.append(_Count(start, value.size, positive, above, (low, high), at, held))
    return out


def _located(pieces: Sequence[_Count], keep: Keep, together: bool) -> Least | None:
    """The smallest kept number; None if it is not in the bracket."""
    size, positive = sum(p.size for p in pieces), sum(p.positive for p in pieces)
    wanted = keep(size, positive)
    if not size or (wanted >= size and not together):
        return Least(0.0)
    if wanted < 1:
        return Least(math.inf)
    left = wanted - sum(p.above for p in pieces)
    if left < 1:
        return None
    low, high = pieces[0].bracket
    equal = [p.at_ends[1] for p in pieces]
    value = high
    if left > sum(equal):
        if low == high:
            return None
        left -= sum(equal)
        inside = np.concatenate([p.inside for p in pieces])
        if left <= inside.size:
            value = float(np.partition(inside, inside.size - left)[inside.size - left])
            left -= int(np.count_nonzero(inside > value))
            equal = [int(np.count_nonzero(p.inside == value)) for p in pieces]
        else:
            left -= inside.size
            value, equal = low, [p.at_ends[0] for p in pieces]
            if left > sum(equal):
                return None
    if together or left == sum(equal):
        return Least(value)
    room = {}
    for piece, count in zip(pieces, equal, strict=True):
        if left < count:
            room[piece.start] = left
        left = max(0, left - count)
    return Least(value, room)
