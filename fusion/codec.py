"""How a block's distributions are written: integers in byte planes, compressed.

Log-probabilities are multiples of 1/64 nat. The K of a position fall, so their differences are
written, in one byte each; what does not fit a byte goes to a list of its own. Ids take two bytes
up to 65,536 tokens and three beyond; equal bytes of all numbers lie together, which is what a
general compressor needs to find the little there is to find.

Decoded, the kept entries and the tail of a position sum to one again. Errors stay within 0.02 nats:
1/128 by rounding, and less than that by the sum.

Shapes: S source positions of a block, K kept entries, P pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from typing_extensions import Buffer

CODEC = "planes-zstd-1"
STEP = 1 / 64  # nats
FLOOR = 60_000  # steps; a log-probability below −937 nats is written as that
NOTHING = 65_535  # gold where no token follows
LARGE = 255  # a difference of so many steps or more has its rest in the list


@dataclass(frozen=True, slots=True)
class Distribution:
    """What one source predicts in one block; row s describes the token after source position s.

    pieces (S,): which piece of the block. ends (S,): bytes of that piece read so far.
    ids, logprobs (S, K): likeliest first. log_tail, gold_logprob (S,): nats; gold is NaN at the
    last position of a piece, where nothing follows.
    """

    pieces: np.ndarray
    ends: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    log_tail: np.ndarray
    gold_logprob: np.ndarray


def id_bytes(vocabulary: int) -> int:
    """Bytes that a token id takes before compression."""
    return 2 if vocabulary <= 65_536 else 3


def encode(rows: Distribution, vocabulary: int) -> tuple[bytes, int]:
    """A block as bytes, and how many they are uncompressed."""
    levels = _levels(rows.logprobs)
    falls = np.diff(levels, axis=1, prepend=0)
    rest = falls[falls >= LARGE] - LARGE
    gold = np.where(np.isnan(rows.gold_logprob), NOTHING, _levels(rows.gold_logprob))
    starts = np.flatnonzero(np.diff(rows.pieces, prepend=-1))
    widths = np.diff(rows.ends, prepend=0)
    widths[starts] = rows.ends[starts]
    count, kept = rows.ids.shape
    raw = b"".join(
        [
            np.array([count, kept, len(starts), len(rest)], "<u4").tobytes(),
            starts.astype("<u4").tobytes(),
            _planes(widths, 2),
            _planes(rows.ids, id_bytes(vocabulary)),
            _planes(np.minimum(falls, LARGE), 1),
            _planes(rest, 2),
            _planes(_levels(rows.log_tail), 2),
            _planes(gold, 2),
        ]
    )
    return pa.compress(raw, codec="zstd", asbytes=True), len(raw)


def decode(content: Buffer, size: int, vocabulary: int) -> Distribution:
    """The block that `encode` wrote; size: how many bytes it is uncompressed."""
    raw = np.frombuffer(pa.decompress(content, size, codec="zstd"), np.uint8)
    count, kept, pieces, large = (int(n) for n in raw[:16].view("<u4"))
    at = 16

    def take(numbers: int, width: int) -> np.ndarray:
        nonlocal at
        planes = raw[at : at + numbers * width].reshape(width, numbers)
        at += numbers * width
        whole = planes[-1].astype(np.int32)
        for plane in planes[-2::-1]:
            whole <<= 8
            whole |= plane
        return whole

    starts = raw[at : at + 4 * pieces].view("<u4").astype(np.int64)
    at += 4 * pieces
    piece = np.zeros(count, np.int64)
    piece[starts] = 1
    piece = np.cumsum(piece) - 1
    ends = np.cumsum(take(count, 2))
    before = np.concatenate([[0], ends])[starts]
    ends -= before[piece]
    ids = take(count * kept, id_bytes(vocabulary)).reshape(count, kept)
    falls = take(count * kept, 1)
    falls[falls == LARGE] += take(large, 2)
    logprobs = -STEP * np.cumsum(falls.reshape(count, kept), axis=1, dtype=np.float64)
    log_tail = -STEP * take(count, 2)
    gold = take(count, 2)
    # Rounded numbers sum to one within 1/128; the shift that mends this is as small.
    total = np.log(np.exp(logprobs).sum(axis=1) + np.exp(log_tail))
    return Distribution(
        piece,
        ends,
        ids,
        logprobs - total[:, None],
        log_tail - total,
        np.where(gold == NOTHING, np.nan, -STEP * gold),
    )


def _levels(logprobs: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        steps = np.rint(np.clip(np.nan_to_num(-logprobs / STEP, posinf=FLOOR), 0, FLOOR))
    return steps.astype(np.int64)


def _planes(numbers: np.ndarray, width: int) -> bytes:
    """Little-endian bytes of all numbers: all lowest bytes, then all of the next, …"""
    return (
        np.stack([(numbers.ravel() >> (8 * i)) & 255 for i in range(width)])
        .astype(np.uint8)
        .tobytes()
    )
