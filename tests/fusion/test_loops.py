"""Compiled loops against the same written out: sums, elections, counts, draws."""

from __future__ import annotations

import itertools
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion import loops
from fusion.tensors import weighted_sum

LAWS = settings(deadline=None, max_examples=40)
SIZES = st.sampled_from([0, 1, 3, 63, 64, 65, 1023, 1024, 1025, 3000])
# Element type, whether there is a rank, and a base: few, as each takes seconds to compile.
KINDS = st.sampled_from(
    [(np.float32, True, True), (np.float32, False, False), (np.float64, False, True)]
)
REALS = st.sampled_from([np.float32, np.float64])


def arrays(size: int, real: type, seed: int, count: int) -> list[np.ndarray]:
    """Numbers of which many are equal, and some zero."""
    g = np.random.default_rng(seed)
    return [(g.integers(-4, 5, size) / 3).astype(real) for _ in range(count)]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as its paper has it."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            b >> 32 ^ counter[1] ^ key[0],
            b % 2**32,
            a >> 32 ^ counter[3] ^ key[1],
            a % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_the_generator_is_the_published_one() -> None:
    """The test vectors that came with its paper."""
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    full = 2**32 - 1
    assert philox([full] * 4, [full] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    found = philox(pi, [0xA4093822, 0x299F31D0])
    assert found == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@LAWS
@given(size=SIZES, real=REALS, seed=st.integers(0, 2**64 - 1), start=st.integers(0, 2**40))
def test_what_is_dropped_follows_from_the_draws(
    size: int, real: type, seed: int, start: int
) -> None:
    model, ground = arrays(size, real, seed, 2)
    key, stream, start = np.uint64(seed), np.uint64(seed ^ 0x5DEECE66D123), 4 * start
    out, ones, bounds = np.full_like(model, 7), np.ones(1, real), np.array([0.3 * 2**32], np.uint32)
    draws = (start, bounds, np.array([key]), np.array([stream]), 2 * ones)
    selection = (None, 0 * ones, np.array([-1]))
    loops.combine(
        out, (model,), ground, *selection, draws, ones, ones, 0, *ones, *ones, *ones, None
    )
    words = [
        philox([n % 2**32, n >> 32, int(stream) % 2**32, int(stream) >> 32],
               [int(key) % 2**32, int(key) >> 32])
        for n in range(start // 4, start // 4 + (size + 3) // 4)
    ]  # fmt: skip
    kept = np.array(words, dtype=float).reshape(-1)[:size] < 0.3 * 2**32
    assert np.array_equal(out, np.where(kept, 2 * (model - ground), 0).astype(real))


def selected(change: np.ndarray, rank: np.ndarray | None, least: float, room: int) -> np.ndarray:
    """τ' of what has at least that rank, of equal ones the first."""
    place = abs(change) if rank is None else rank
    equal = place == least
    late = equal & (equal.cumsum() > room) if room >= 0 else np.zeros_like(equal)
    return np.where((place < least) | late, 0, change)


@LAWS
@given(
    size=SIZES,
    kind=KINDS,
    seed=st.integers(0, 10**6),
    least=st.sampled_from([0, 1 / 3, 1, 9]),
    elect=st.sampled_from([-1, 0, 1]),
    rooms=st.lists(st.sampled_from([-1, 0, 1, 5, 400]), min_size=2, max_size=2),
)
def test_sums_and_elections(
    size: int, kind: tuple, seed: int, least: float, elect: int, rooms: list[int]
) -> None:
    real, ranked, onto = kind
    one, two, ground, rank, base = arrays(size, real, seed, 5)
    leasts, weights, votes = np.array([[least, 1], [1, 0.5], [0.25, 1]], real)
    out = np.empty_like(one)
    floor, otherwise, scale = np.array([0.6, 3, 0.75], real)
    given_rank, given_base = rank if ranked else None, base if onto else None
    loops.combine(
        out, (one, two), ground, given_rank, leasts, np.array(rooms), None, weights, votes, elect,
        floor, otherwise, scale, given_base,
    )  # fmt: skip
    kept = [
        selected(model - ground, given_rank, *which)
        for model, *which in zip((one, two), leasts, rooms, strict=True)
    ]
    total = kept[0] * votes[0] + kept[1] * votes[1]
    if elect:
        sign = np.where((total >= 0) if elect > 0 else (total > 0), 1, -1)
        parts = [change * weight for change, weight in zip(kept, weights, strict=True)]
        agrees = [part * sign > 0 for part in parts]
        total = sum(part * a for part, a in zip(parts, agrees, strict=True))
        surviving = sum(weight * a for weight, a in zip(weights, agrees, strict=True))
        total = total / np.where(surviving >= floor, surviving, otherwise)
    expected = total * scale + (base if onto else 0)
    assert np.array_equal(out, expected.astype(real))


@LAWS
@given(size=SIZES, kind=KINDS, seed=st.integers(0, 10**6))
def test_reductions(size: int, kind: tuple, seed: int) -> None:
    real, ranked, onto = kind
    count = 2
    *models, ground, extra = arrays(size, real, seed, count + 2)
    wide = np.array(models, float)
    changes = wide - ground.astype(float)
    close = pytest.approx
    of = changes if onto else wide
    assert loops.products(tuple(models), ground if onto else None) == close(of @ of.T)
    rank = extra if ranked else None
    leasts, rooms = np.full(count, 1 / 3, real), np.full(count, seed % 9 - 1)
    some = [selected(m - ground, rank, leasts[0], rooms[0]).astype(float) for m in models]
    found = loops.squares(tuple(models), ground, rank, leasts, rooms)
    assert found == close(np.square(some).sum(1))
    out = np.empty_like(ground)
    loops.variance(out, tuple(models))
    assert out == close(wide.var(0) * count, abs=1e-6 if real == np.float32 else 1e-14)
    assert not out[(wide == wide[0]).all(0)].any()
    loops.magnitude(out, models[0], ground)
    assert np.array_equal(out, abs(models[0] - ground))
    low, high = real(1 / 3), real(1)
    inside = np.empty(size + 1, real)
    *counts, between = loops.count(models[0], ground, low, high, inside)
    assert loops.count(out, None, low, high, inside) == (*counts, between)
    assert counts == [(out > 0).sum(), (out > high).sum()]
    assert np.array_equal(inside[:between], out[(out >= low) & (out <= high)])


@LAWS
@given(
    width=st.sampled_from([1, 31, 32, 65, 300]),
    height=st.integers(0, 5),
    real=REALS,
    seed=st.integers(0, 10**6),
    rows=st.booleans(),
)
def test_columns(width: int, height: int, real: type, seed: int, rows: bool) -> None:
    *models, ground = arrays(width * height, real, seed, 3)
    wide = np.array([*models, ground], float).reshape(3, height, width)
    over = 2 if rows else 1
    squares, inner = loops.columns(tuple(models), ground, width, rows)
    assert squares == pytest.approx((wide * wide).sum(over))
    assert inner == pytest.approx((wide * wide[2]).sum(over))
    weights = np.array(arrays(height if rows else width, real, seed + 1, 2))
    out = np.empty_like(ground)
    loops.weigh(out, tuple(models), ground, weights, width, rows)
    spread = weights[:, :, None] if rows else weights[:, None, :]
    changes = np.array(models).reshape(2, height, width) - ground.reshape(height, width)
    expected = (changes[0] * spread[0] + changes[1] * spread[1]).reshape(-1) + ground
    assert np.array_equal(out, expected)


def test_what_is_no_number_shows() -> None:
    model, ground = np.array([np.nan, 1], np.float32), np.zeros(2, np.float32)
    ones, out = np.ones(1, np.float32), np.zeros(2, np.float32)
    for elect, room in itertools.product((-1, 0, 1), (-1, 0, 3)):
        loops.combine(
            out, (model,), ground, None, ones / 2, np.array([room]), None, ones, ones, elect,
            *ones, *ones, *ones, ground,
        )  # fmt: skip
        assert np.isnan(out[0])
        assert out[1] == 1


def test_it_works_without_a_place_for_what_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in place of each folder: so that it holds for root, too, who may write anywhere."""
    (tmp_path / "taken").touch()
    copy = tmp_path / "copied_loops.py"
    copy.write_text(Path(loops.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "__pycache__").touch()
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    spec = spec_from_file_location("copied_loops", copy)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    out = np.zeros(2, np.float32)
    module.magnitude(out, np.array([-1, 2], np.float32), None)
    assert out.tolist() == [1, 2]


def test_it_does_not_matter_how_tensors_lie_in_memory() -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    column, like = whole[:, 1], torch.nn.Parameter(whole[:, 2].clone())
    assert weighted_sum([column, like], [1.0, 2.0]).tolist() == [5, 14, 23, 32]
