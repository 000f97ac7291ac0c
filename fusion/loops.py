"""Loops over the elements of models' tensors, compiled, each of which goes through memory once.

The same in torch is an operation after another, each through memory again. Arrays are flat, of one
length and one real type. Each product and each sum is rounded by itself and in the order written,
so neither the machine nor the number of threads decides a bit. No lock is held, so pieces can be
worked on side by side. The first call in a process compiles a loop, or loads what an earlier
process has kept on disk, where there is a place for that.

Symbols as in `merging.py`: τ is a model's θ less θ_0, the `ground`, or θ itself if that is None; τ'
is τ where its rank, |τ| if None, is at least `least`, else 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np

BLOCK = 1024  # elements at once, so that what is between two steps stays nearest to the processor
LANES = 256  # partial sums of a reduction, which are added up in their order at the end
ROW = 32  # the same of a row, which may be short
Array = np.ndarray


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # numpy's division: Python's would look for a divisor of 0 at each.
    try:
        made = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return cast("Callable[..., Any]", made)


@_compiled
def _change(model: Array, ground: Array | None, i: int) -> float:
    return model[i] if ground is None else model[i] - ground[i]


@_compiled
def _select(
    row: Array, model: Array, ground: Array | None, rank: Array | None, least: float, room: int
) -> int:
    """row ← τ'; how many more that equal `least` are kept, if not all are (−1)."""
    zero = row.dtype.type(0)
    equal = numba.int32(0)
    if room > 0:
        for i in range(row.size):
            place = abs(_change(model, ground, i)) if rank is None else rank[i]
            equal = numba.int32(equal + numba.int32(place == least))
    if room < 0 or (room > 0 and equal <= room):
        for i in range(row.size):
            change = _change(model, ground, i)
            lacks = abs(change) < least if rank is None else rank[i] < least
            row[i] = zero if lacks else change
        return room - int(equal)
    for i in range(row.size):
        change = _change(model, ground, i)
        place = abs(change) if rank is None else rank[i]
        kept = place == least and room > 0
        room -= int(kept)
        row[i] = zero if place <= least and not kept else change
    return room


@_compiled
def _agree(merged: Array, surviving: Array, sign: Array, row: Array, weight: float) -> None:
    zero = weight - weight
    for i in range(sign.size):
        part = row[i] * weight
        differs = part * sign[i] <= zero
        merged[i] += zero if differs else part
        surviving[i] += zero if differs else weight


@_compiled
def _divide(merged: Array, surviving: Array, floor: float, otherwise: float) -> None:
    for i in range(merged.size):
        weight = surviving[i]
        merged[i] /= weight if abs(weight) >= floor else otherwise


@_compiled
def combine(
    out: Array,
    models: tuple[Array, ...],
    ground: Array | None,
    rank: Array | None,
    leasts: Array,
    rooms: Array,
    draws: tuple[int, Array, Array, Array, Array] | None,
    weights: Array,
    votes: Array,
    elect: int,
    floor: float,
    otherwise: float,
    scale: float,
    base: Array | None,
) -> None:
    """out ← θ_0 + scale · Σ w τ' / Σ w, θ_0 from `base`, or 0 if that is None.

    `rooms`: how many elements that equal a model's `least` are kept, the first ones, or −1 for all.
    `draws` select in its place where there are any: number of the first element, a multiple of 4,
    and the models' bounds, keys, streams and factors (see `_drop`). Draws are those of
    Philox4x32-10 (Salmon et al. 2011): the four numbers of 32 bits that counter (n // 4, stream)
    has under the key are those of four elements, n the first. Counter, stream, key: of 64 bits.

    With `elect` not 0, the sums are over the models whose w τ' has the sign of Σ votes τ', a sum of
    0 counting as the sign of `elect`, and where |Σ w| is below `floor`, `otherwise` is divided by;
    else the sum is Σ votes τ', undivided. What is not a number is kept, so that it shows.
    """
    left = rooms.copy()
    rows = np.empty((len(models), BLOCK), out.dtype)
    surviving, merged = np.empty(BLOCK, out.dtype), np.empty(BLOCK, out.dtype)
    drawn = np.empty((4, BLOCK // 4), np.uint32)
    zero, one = out.dtype.type(0), out.dtype.type(1)
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        size = stop - start
        total = out[start:stop]
        below = None if ground is None else ground[start:stop]
        ranks = None if rank is None else rank[start:stop]
        # From −0, which adds nothing: 0 + −0 is 0, and a merge of copies would not be the copy.
        total[:] = -zero
        for m in range(len(models)):
            row, model = rows[m, :size], models[m][start:stop]
            if draws is None and elect == 0 and rank is None and left[m] < 0 and leasts[m] <= 0:
                for i in range(size):  # all of it, at once
                    total[i] += _change(model, below, i) * votes[m]
                continue
            if draws is None:
                left[m] = _select(row, model, below, ranks, leasts[m], left[m])
            else:
                first, bounds, keys, streams, factors = draws
                _philox(drawn, keys[m], streams[m], (first + start) // 4)
                _drop(row, drawn, model, below, bounds[m], factors[m])
            vote = votes[m]
            for i in range(size):
                total[i] += row[i] * vote
        if elect != 0:
            into, weight = merged[:size], surviving[:size]
            into[:], weight[:] = zero, zero
            for i in range(size):
                plus = total[i] >= zero if elect > 0 else total[i] > zero
                total[i] = one if plus else -one
            for m in range(len(models)):
                _agree(into, weight, total, rows[m, :size], weights[m])
            _divide(into, weight, floor, otherwise)
            total[:] = into
        if base is None:
            for i in range(size):
                total[i] = total[i] * scale
        else:
            onto = base[start:stop]
            for i in range(size):
                total[i] = total[i] * scale + onto[i]


@_compiled
def variance(out: Array, models: tuple[Array, ...]) -> None:
    """out ← M times the variance over the models, about the first: 0 where they agree."""
    mean = np.empty(BLOCK, out.dtype)
    share = out.dtype.type(1 / len(models))
    first = models[0]
    for start in range(0, out.size, BLOCK):
        size = min(BLOCK, out.size - start)
        stop = start + size
        ground, sums = first[start:stop], out[start:stop]
        mean[:size] = 0
        for m in range(1, len(models)):
            model = models[m][start:stop]
            for i in range(size):
                mean[i] += (model[i] - ground[i]) * share
        for i in range(size):
            sums[i] = mean[i] * mean[i]
        for m in range(1, len(models)):
            model = models[m][start:stop]
            for i in range(size):
                apart = model[i] - ground[i] - mean[i]
                sums[i] += apart * apart


@_compiled
def products(models: tuple[Array, ...], ground: Array | None) -> Array:
    """(M, M) of Σ τ_i τ_j, in float64, each LANES-th product in a sum."""
    count = len(models)
    lanes = np.zeros((count, count, LANES))
    wide = np.empty((count, LANES))
    for start in range(0, models[0].size, LANES):
        size = min(LANES, models[0].size - start)
        for m in range(count):
            model, row = models[m][start : start + size], wide[m]
            for i in range(size):
                row[i] = model[i] if ground is None else model[i] - ground[start + i]
        for one in range(count):
            for two in range(one, count):
                a, b, sums = wide[one], wide[two], lanes[one, two]
                for i in range(size):
                    sums[i] += a[i] * b[i]
    out = np.zeros((count, count))
    for one in range(count):
        for two in range(one, count):
            for i in range(LANES):
                out[one, two] += lanes[one, two, i]
            out[two, one] = out[one, two]
    return out


@_compiled
def squares(
    models: tuple[Array, ...],
    ground: Array | None,
    rank: Array | None,
    leasts: Array,
    rooms: Array,
) -> Array:
    """(M,) of Σ τ'², in float64, each LANES-th square in a sum; `rooms` as in `combine`."""
    left = rooms.copy()
    lanes = np.zeros((len(models), LANES))
    row = np.empty(LANES, models[0].dtype)
    for start in range(0, models[0].size, LANES):
        stop = min(start + LANES, models[0].size)
        size = stop - start
        below = None if ground is None else ground[start:stop]
        ranks = None if rank is None else rank[start:stop]
        for m in range(len(models)):
            sums, model = lanes[m], models[m][start:stop]
            left[m] = _select(row[:size], model, below, ranks, leasts[m], left[m])
            for i in range(size):
                wide = np.float64(row[i])
                sums[i] += wide * wide
    out = np.zeros(len(models))
    for m in range(len(models)):
        for i in range(LANES):
            out[m] += lanes[m, i]
    return out


@_compiled
def _products(part: Array, below: Array, lanes: Array) -> tuple[float, float]:
    """Σ θ² and Σ θ θ_0, each ROW-th product in a sum."""
    lanes[:] = 0
    squares, inner = lanes
    whole = part.size // ROW * ROW
    for start in range(0, whole, ROW):
        for i in range(ROW):
            one, two = np.float64(part[start + i]), np.float64(below[start + i])
            squares[i] += one * one
            inner[i] += one * two
    for i in range(part.size - whole):
        one, two = np.float64(part[whole + i]), np.float64(below[whole + i])
        squares[i] += one * one
        inner[i] += one * two
    both = 0.0, 0.0
    for i in range(ROW):
        both = both[0] + squares[i], both[1] + inner[i]
    return both


@_compiled
def columns(models: tuple[Array, ...], ground: Array, width: int, rows: bool) -> Array:
    """(2, M + 1, columns) of Σ θ² and Σ θ θ_0 over each column, the ground last, in float64.

    Arrays are matrices of that width; with `rows`, their rows are what is summed over.
    """
    height = ground.size // width
    out = np.zeros((2, len(models) + 1, height if rows else width))
    lanes = np.empty((2, ROW))
    for row in range(height):
        place = slice(row * width, (row + 1) * width)
        below = ground[place]
        for m in range(len(models) + 1):
            part = below if m == len(models) else models[m][place]
            squares, inner = out[0, m], out[1, m]
            if rows:
                squares[row], inner[row] = _products(part, below, lanes)
            else:
                for i in range(width):
                    one, two = np.float64(part[i]), np.float64(below[i])
                    squares[i] += one * one
                    inner[i] += one * two
    return out


@_compiled
def weigh(
    out: Array, models: tuple[Array, ...], ground: Array, weights: Array, width: int, rows: bool
) -> None:
    """out ← θ_0 + Σ w τ, a weight a model and column, or row, of matrices of that width."""
    for row in range(ground.size // width):
        place = slice(row * width, (row + 1) * width)
        total, below = out[place], ground[place]
        total[:] = 0
        for m in range(len(models)):
            part, weight = models[m][place], weights[m]
            if rows:
                for i in range(width):
                    total[i] += (part[i] - below[i]) * weight[row]
            else:
                for i in range(width):
                    total[i] += (part[i] - below[i]) * weight[i]
        for i in range(width):
            total[i] += below[i]


@_compiled
def magnitude(out: Array, model: Array, ground: Array | None) -> None:
    """out ← |τ|."""
    for i in range(out.size):
        out[i] = abs(_change(model, ground, i))


@_compiled
def count(
    values: Array, ground: Array | None, low: float, high: float, inside: Array
) -> tuple[int, int, int]:
    """How many values, |τ| if there is a ground, are above 0, above `high`, from `low` to `high`.

    Those are left in `inside`, in their order; it has room for one more than all. `low` and `high`
    are of the values' type.
    """
    positive, above, between = 0, 0, 0
    zero = low - low
    block = np.empty(BLOCK, values.dtype)
    near = np.zeros(BLOCK, np.uint8)
    eights = near.view(np.uint64)
    for start in range(0, values.size, BLOCK):
        size = min(BLOCK, values.size - start)
        part = values[start : start + size]
        if ground is None:
            block[:size] = part
        else:
            below = ground[start : start + size]
            for i in range(size):
                block[i] = abs(part[i] - below[i])
        # In 32 bits, as many at once as there are values.
        up = over = numba.int32(0)
        for i in range(size):
            up = numba.int32(up + numba.int32(block[i] > zero))
        for i in range(size):
            over = numba.int32(over + numba.int32(block[i] > high))
        positive += int(up)
        above += int(over)
        for i in range(size):
            near[i] = (block[i] >= low) & (block[i] <= high)
        near[size:] = 0
        for eight in range(BLOCK // 8):
            if eights[eight]:
                for i in range(8 * eight, 8 * eight + 8):
                    inside[between] = block[i]  # overwritten by the next one unless it counts
                    between += near[i]
    return positive, above, between


@_compiled
def _philox(drawn: Array, key: int, stream: int, counter: int) -> None:
    """The numbers of the counters from `counter` on, a column each, words of 32 bits."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for j in range(drawn.shape[1]):
        n = np.uint64(counter) + np.uint64(j)
        c0, c1, c2, c3 = n & low, n >> half, stream & low, stream >> half
        k0, k1 = key & low, key >> half
        for _ in range(10):  # words of 32 bits in 64: several counters at once stay in registers
            a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
            c0, c1, c2, c3 = (b >> half) ^ c1 ^ k0, b & low, (a >> half) ^ c3 ^ k1, a & low
            k0, k1 = k0 + np.uint64(0x9E3779B9) & low, k1 + np.uint64(0xBB67AE85) & low
        drawn[0, j], drawn[1, j], drawn[2, j], drawn[3, j] = c0, c1, c2, c3


@_compiled
def _drop(
    row: Array, drawn: Array, model: Array, ground: Array | None, bound: int, factor: float
) -> None:
    """row ← factor · τ where the element's draw is at most the bound, else 0."""
    zero = row.dtype.type(0)
    words = np.empty(drawn.size, np.uint32)
    for place in range(4):
        for j in range(drawn.shape[1]):
            words[4 * j + place] = drawn[place, j]
    for i in range(row.size):
        row[i] = _change(model, ground, i) * factor if words[i] <= bound else zero
