"""Merge methods that select, calculate and erase: three readings of SCE. Symbols: `merging.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fusion.ranking import Least, least_kept
from fusion.tensors import agreeing, dot, each, floating, fraction, ordered, weighted_sum

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
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
    changes, weights = _selected(tensors, base, found, start)
    return _erased(changes, weights)[0].add_(floating(base))


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
    changes, weights = _selected(tensors, base, found, start, floor=_NO_MASS)
    merged, surviving = _erased(changes, weights)
    return merged.div_(surviving.clamp_(min=_NO_MASS)).add_(floating(base))


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
    changes, weights = _selected(tensors, base, everything, start)
    merged, surviving = _erased(changes, weights)
    return merged.div_(surviving.masked_fill_(surviving <= 0, 1)).add_(floating(base))


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
            iter(least_kept(whole, lambda tensors, _: [_variance(tensors)], keep)), chosen
        )

    def squares(
        start: int, _: str, tensors: Sequence[Tensor], base: Tensor
    ) -> tuple[int, list[float]]:
        mask = chosen.mask(_variance(tensors), start) if chosen.value > 0 else None
        changes = [floating(tensor) - floating(base) for tensor in tensors]
        held = changes if mask is None else [change.mul_(mask) for change in changes]
        return changes[0].numel(), [dot(change, change) for change in held]

    parts = list(each(whole, squares))
    totals = [math.fsum(column) for column in zip(*(sums for _, sums in parts), strict=True)]
    return Selected(chosen, totals, sum(size for size, _ in parts))


def _variance(tensors: Sequence[Tensor]) -> Tensor:
    """M times the variance over the models.

    It is taken about the first model rather than the base: it is the same, and exactly zero where
    models agree.
    """
    models, _ = ordered(tensors)
    apart = [model - models[0] for model in models[1:]]
    if not apart:
        return models[0].new_zeros(models[0].shape)
    mean = weighted_sum(apart, [1 / len(models)] * len(apart))
    out = mean.square()
    for one in apart:
        out += one.sub_(mean).square_()
    return out


def _selected(
    tensors: Sequence[Tensor], base: Tensor, found: Selected, start: int, floor: float = 0.0
) -> tuple[list[Tensor], list[float]]:
    """Selected changes and weights, ordered.

    A weight is the model's share of the squared change; equal where it is zero, or its mean below
    `floor`.
    """
    models, (squares,) = ordered(tensors, found.squares)
    base = floating(base)
    changes = [model - base for model in models]
    if found.least.value > 0:
        mask = found.least.mask(_variance(tensors), start)
        changes = [change.mul_(mask) for change in changes]
    total = math.fsum(squares)
    if total == 0 or total / found.size < floor:
        return changes, [1 / len(squares)] * len(squares)
    return changes, [square / total for square in squares]


def _erased(changes: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    total = weighted_sum(changes, [1.0] * len(changes))
    parts = [change.mul_(weight) for weight, change in zip(weights, changes, strict=True)]
    return agreeing(parts, weights, total)
