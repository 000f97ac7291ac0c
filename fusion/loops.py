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
Array = np.ndarray


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # numpy's division: Python's would look for a divisor of 0 at each.
    try:
        made = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return cast("Callable[..., Any]", made)


@_compiled
def _add(
    total: Array, model: Array, ground: Array | None, rank: Array | None, least: float, vote: float
) -> None:
    zero = vote - vote
    for i in range(total.size):
        change = model[i] if ground is None else model[i] - ground[i]
        lacks = abs(change) < least if rank is None else rank[i] < least
        total[i] += zero if lacks else change * vote


@_compiled
def _add_agreeing(
    merged: Array,
    surviving: Array,
    total: Array,
    model: Array,
    ground: Array | None,
    rank: Array | None,
    least: float,
    weight: float,
    zero_is_positive: bool,
) -> None:
    zero = weight - weight
    for i in range(total.size):
        change = model[i] if ground is None else model[i] - ground[i]
        lacks = abs(change) < least if rank is None else rank[i] < least
        part = zero if lacks else change * weight
        plus = total[i] >= zero if zero_is_positive else total[i] > zero
        differs = part <= zero if plus else part >= zero
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
    weights: Array,
    votes: Array,
    elect: int,
    floor: float,
    otherwise: float,
    scale: float,
    base: Array | None,
) -> None:
    """out ← θ_0 + scale · Σ w τ' / Σ w, θ_0 from `base`, or 0 if that is None.

    With `elect` not 0, the sums are over the models whose w τ' has the sign of Σ votes τ', a sum of
    0 counting as the sign of `elect`, and where |Σ w| is below `floor`, `otherwise` is divided by;
    else the sum is Σ votes τ', undivided. What is not a number is kept, so that it shows.
    """
    surviving, merged = np.empty(BLOCK, out.dtype), np.empty(BLOCK, out.dtype)
    zero = scale - scale
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        total = out[start:stop]
        below = None if ground is None else ground[start:stop]
        ranks = None if rank is None else rank[start:stop]
        # From −0, which adds nothing: 0 + −0 is 0, and a merge of copies would not be the copy.
        total[:] = -zero
        for m in range(len(models)):
            _add(total, models[m][start:stop], below, ranks, leasts[m], votes[m])
        if elect != 0:
            size = stop - start
            into, left = merged[:size], surviving[:size]
            into[:], left[:] = zero, zero
            for m in range(len(models)):
                model = models[m][start:stop]
                _add_agreeing(
                    into, left, total, model, below, ranks, leasts[m], weights[m], elect > 0
                )
            _divide(into, left, floor, otherwise)
            total[:] = into
        if base is None:
            for i in range(total.size):
                total[i] = total[i] * scale
        else:
            onto = base[start:stop]
            for i in range(total.size):
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
def products(models: tuple[Array, ...], ground: Array | None, chosen: Array | None) -> Array:
    """(M, M) of Σ τ_i τ_j over the chosen elements, in float64, each LANES-th product in a sum."""
    count = len(models)
    lanes = np.zeros((count, count, LANES))
    wide = np.empty((count, LANES))
    for start in range(0, models[0].size, LANES):
        size = min(LANES, models[0].size - start)
        for m in range(count):
            model, row = models[m][start : start + size], wide[m]
            for i in range(size):
                change = model[i] if ground is None else model[i] - ground[start + i]
                row[i] = change if chosen is None else change * chosen[start + i]
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
def magnitude(out: Array, model: Array, ground: Array | None) -> None:
    """out ← |τ|."""
    for i in range(out.size):
        out[i] = abs(model[i] if ground is None else model[i] - ground[i])


@_compiled
def count(values: Array, low: float, high: float, inside: Array) -> tuple[int, int, int]:
    """How many values are above 0, above `high`, and from `low` to `high`.

    Those are left in `inside`, in their order; it has room for one more than all. `low` and `high`
    are of the values' type.
    """
    positive, above, between = 0, 0, 0
    zero = low - low
    whole = values.size // 32 * 32
    for start in range(0, values.size, 32):
        near = numba.int32(1)
        if start < whole:
            # In 32 bits, as many at once as there are values.
            up = over = near = numba.int32(0)
            for i in range(start, start + 32):
                up = numba.int32(up + numba.int32(values[i] > zero))
                over = numba.int32(over + numba.int32(values[i] > high))
                near = numba.int32(near + numba.int32((values[i] >= low) & (values[i] <= high)))
            positive += int(up)
            above += int(over)
        else:
            for i in range(start, values.size):
                positive += values[i] > zero
                above += values[i] > high
        if near:
            for i in range(start, min(start + 32, values.size)):
                inside[between] = values[i]  # overwritten by the next one unless it counts
                between += (values[i] >= low) & (values[i] <= high)
    return positive, above, between


@_compiled
def _philox(drawn: Array, key: int, stream: int, counter: int) -> None:
    """The numbers of the counters from `counter` on, a column each, words of 32 bits."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = drawn[0], drawn[1], drawn[2], drawn[3]
    for j in range(drawn.shape[1]):
        n = np.uint64(counter + j)
        c0[j], c1[j] = np.uint32(n & low), np.uint32(n >> half)
        c2[j], c3[j] = np.uint32(stream & low), np.uint32(stream >> half)
    k0, k1 = np.uint32(key & low), np.uint32(key >> half)
    for _ in range(10):
        for j in range(drawn.shape[1]):
            a = np.uint64(0xD2511F53) * np.uint64(c0[j])
            b = np.uint64(0xCD9E8D57) * np.uint64(c2[j])
            c0[j] = np.uint32(b >> half) ^ c1[j] ^ k0
            c1[j] = np.uint32(b)
            c2[j] = np.uint32(a >> half) ^ c3[j] ^ k1
            c3[j] = np.uint32(a)
        k0 = np.uint32(k0 + np.uint32(0x9E3779B9))
        k1 = np.uint32(k1 + np.uint32(0xBB67AE85))


@_compiled
def drop(
    out: Array, model: Array, ground: Array, density: float, key: int, stream: int, start: int
) -> None:
    """out ← τ where the element's draw is below the density, else 0.

    Draws are those of Philox4x32-10 (Salmon et al. 2011): the four numbers of 32 bits that counter
    (n // 4, stream) has under the key are those of four elements, n the first. `start`: n of the
    first element, a multiple of 4. Counter, stream and key are of 64 bits.
    """
    bound = np.uint64(np.ceil(density * 4294967296.0))
    last = np.uint32(min(bound - np.uint64(1), np.uint64(0xFFFFFFFF)))
    zero = out.dtype.type(0)
    drawn = np.empty((4, 512), np.uint32)
    row = np.empty(2048, np.uint32)
    for first in range(0, out.size, 2048):
        _philox(drawn, key, stream, (start + first) // 4)
        for place in range(4):
            for j in range(512):
                row[4 * j + place] = drawn[place, j]
        stop = min(first + 2048, out.size)
        into, taken, below = out[first:stop], model[first:stop], ground[first:stop]
        for i in range(into.size):
            change = taken[i] - below[i]
            into[i] = change if row[i] <= last else zero
