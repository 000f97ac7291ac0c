"""Merge methods that select, calculate and erase: three readings of SCE. Symbols: `merging.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fusion.ranking import Least, least_kept
from fusion.tensors import Changes, changes, each, elected, flat, fraction, ordered, squares

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
    import numpy as np
    from torch import Tensor

    from fusion.tensors import Whole

_NO_MASS = 1e-6  # mergekit's: less mean square change than this counts as none


class Selected(NamedTuple):
    """What SCE finds over a tensor: the smallest variance selected, Σ τ'² a model, its size."""

    least: Least
    squares: list[float]
    size: int


def sce_paper(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    select_topk: float = 0.1,
    start: int = 0,
    found: Selected | None = None,
) -> Tensor:
    r"""Select, calculate, erase (SCE), as the paper has it.

        select:     τ'_i = τ_i where Var_i(τ_i) is among the largest, else 0
        calculate:  w_i = Σ τ'_i² / Σ_j Σ τ'_j², one weight a tensor
        erase:      s = sign(Σ_i τ'_i), a sum of 0 counting as +
        θ = θ_0 + Σ_{i: sign(τ'_i) = s} w_i τ'_i

    `select_topk` is the fraction selected of the elements whose variance is not zero, at least
    one; 1 selects everything. Where the models agree everywhere, everything is selected, so copies
    merge to the copy.

    Source: FuseChat, 2408.07990, equations 5-9; τ = 10 % as for FuseChat-7B-v2.0.
    Relative to the paper: it takes τ % of all elements; those without variance would be drawn by
    chance, so they do not count here.
    """
    found = found or select([("", tensors, base)], select_topk=select_topk, least=1)
    return _erased(tensors, base, found, start, division=(math.inf, 1.0))


def sce_mergekit(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    select_topk: float = 1.0,
    start: int = 0,
    found: Selected | None = None,
) -> Tensor:
    r"""Select, calculate, erase, as mergekit 0.1.5 has it, with its default.

        θ = θ_0 + Σ_{i: sign(τ'_i) = s} w_i τ'_i / max(1e-6, Σ_{the same i} w_i)

    τ', w and s as in `sce_paper`. Relative to the paper: divides by the weights that survive; and
    all w_i are equal where Σ_i mean(τ'_i²) < 1e-6, which light fine-tuning often stays below. The
    base where nothing is selected, so for select_topk < 1 copies merge to the base.
    """
    found = found or select([("", tensors, base)], select_topk=select_topk)
    return _erased(tensors, base, found, start, _NO_MASS, division=(_NO_MASS, _NO_MASS))


def sce_fusechat(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    select_topk: float = 0.1,
    start: int = 0,
    found: Selected | None = None,
) -> Tensor:
    r"""Select, calculate, erase, as the code released with FuseChat has it.

        θ = θ_0 + Σ_{i: sign(τ_i) = s} w_i τ_i / Σ_{the same i} w_i,   s = sign(Σ_i τ_i)

    w as in `sce_paper`. Relative to the paper: the selection decides the weights only, all elements
    are merged, and the sum is divided by the weights that survive.
    """
    found = found or select([("", tensors, base)], select_topk=select_topk)
    everything = Selected(Least(0.0), found.squares, found.size)
    return _erased(tensors, base, everything, start, division=(1e-37, 1.0))


def select(whole: Whole, *, select_topk: float = 0.1, least: int = 0) -> Selected:
    """The share of a tensor that varies most over the models, and their squared changes there.

    If nothing varies, all is selected where `least` asks for any at all.
    """
    fraction("select_topk", select_topk)

    def keep(size: int, varied: int) -> int:
        return max(int(varied * select_topk), least) if varied else least * size

    chosen = Least(0.0)
    if select_topk < 1:
        chosen = next(
            iter(least_kept(whole, lambda tensors, _: [(_variance(tensors), None)], keep)), chosen
        )

    def moved(
        start: int, _: str, tensors: Sequence[Tensor], base: Tensor
    ) -> tuple[int, list[float]]:
        parts = _selected(changes(tensors, base), tensors, chosen, start)
        return parts.models[0].size, squares(parts)

    parts = list(each(whole, moved))
    totals = [math.fsum(column) for column in zip(*(sums for _, sums in parts), strict=True)]
    return Selected(chosen, totals, sum(size for size, _ in parts))


def _variance(tensors: Sequence[Tensor]) -> np.ndarray:
    """M times the variance over the models.

    It is taken about the first model rather than the base: it is the same, and exactly zero where
    models agree.
    """
    import numpy as np

    from fusion import loops

    models = tuple(map(flat, ordered(tensors)[0]))
    out = np.empty_like(models[0])
    loops.variance(out, models)
    return out


def _selected(parts: Changes, tensors: Sequence[Tensor], least: Least, start: int) -> Changes:
    """Of changes what varies enough over the models."""
    if least.value <= 0:
        return parts
    count = len(parts.models)
    leasts, rooms = [least.value] * count, [least.of(start)] * count
    return parts._replace(rank=_variance(tensors), leasts=leasts, rooms=rooms)


def _erased(
    tensors: Sequence[Tensor],
    base: Tensor,
    found: Selected,
    start: int,
    floor: float = 0.0,
    *,
    division: tuple[float, float],
) -> Tensor:
    """The selected changes that have the elected sign, weighed, on the base.

    A weight is the model's share of the squared change; equal where it is zero, or its mean below
    `floor`.
    """
    models, (moved,) = ordered(tensors, found.squares)
    parts = _selected(changes(models, base), models, found.least, start)
    total = math.fsum(moved)
    weights = [1 / len(moved)] * len(moved)
    if total > 0 and total / found.size >= floor:
        weights = [square / total for square in moved]
    ones = [1.0] * len(moved)
    return elected(parts, weights, ones, base, floor=division[0], otherwise=division[1])
