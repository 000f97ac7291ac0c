"""Merge methods that select, calculate and erase: three readings of SCE. Symbols: `merging.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusion.tensors import agreeing, dot, floating, fraction, largest, ordered, weighted_sum

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
    from torch import Tensor

_NO_MASS = 1e-6  # mergekit's: less mean square change than this counts as none


def sce_paper(tensors: Sequence[Tensor], base: Tensor, *, select_topk: float = 0.1) -> Tensor:
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
    models, base, chosen = _selected(tensors, base, select_topk, least=1)
    changes = [(model - base).where(chosen, 0) for model in models]
    return base + _erased(changes, _energies(changes))[0]


def sce_mergekit(tensors: Sequence[Tensor], base: Tensor, *, select_topk: float = 1.0) -> Tensor:
    r"""Select, calculate, erase, as mergekit 0.1.5 has it, with its default.

        θ = θ_0 + Σ_{i: sign(τ'_i) = s} w_i τ'_i / max(1e-6, Σ_{the same i} w_i)

    τ', w and s as in `sce_paper`. Relative to the paper: divides by the weights that survive; and
    all w_i are equal where Σ_i mean(τ'_i²) < 1e-6, which light fine-tuning often stays below. The
    base where nothing is selected, so for select_topk < 1 copies merge to the base.
    """
    models, base, chosen = _selected(tensors, base, select_topk, least=0)
    changes = [(model - base).where(chosen, 0) for model in models]
    merged, surviving = _erased(changes, _energies(changes, floor=_NO_MASS))
    return base + merged / surviving.clamp(min=_NO_MASS)


def sce_fusechat(tensors: Sequence[Tensor], base: Tensor, *, select_topk: float = 0.1) -> Tensor:
    r"""Select, calculate, erase, as the code released with FuseChat has it.

        θ = θ_0 + Σ_{i: sign(τ_i) = s} w_i τ_i / Σ_{the same i} w_i,   s = sign(Σ_i τ_i)

    w as in `sce_paper`. Relative to the paper: the selection decides the weights only, all elements
    are merged, and the sum is divided by the weights that survive.
    """
    models, base, chosen = _selected(tensors, base, select_topk, least=0)
    changes = [model - base for model in models]
    weights = _energies([change.where(chosen, 0) for change in changes])
    merged, surviving = _erased(changes, weights)
    return base + merged / surviving.where(surviving > 0, 1)


def _selected(
    tensors: Sequence[Tensor], base: Tensor, share: float, least: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Ordered models, base, and the mask of the share that varies most over the models.

    Variance is taken about the first model rather than the base: it is the same, and exactly zero
    where models agree. If none varies, all are selected where `least` asks for any at all.
    """
    fraction("select_topk", share)
    models, _ = ordered(tensors, None)
    if share == 1:
        return models, floating(base), base.new_ones(base.shape).bool()
    mean = weighted_sum([model - models[0] for model in models], [1 / len(models)] * len(models))
    variance = mean.new_zeros(mean.shape)
    for model in models:
        variance += (model - models[0] - mean).square()
    varied = int((variance > 0).sum())
    keep = max(int(varied * share), least) if varied else least * variance.numel()
    chosen = largest(variance, keep) if keep else variance.new_zeros(variance.shape).bool()
    return models, floating(base), chosen


def _energies(changes: Sequence[Tensor], floor: float = 0.0) -> list[float]:
    """Each model's share of the squared change; equal where it is zero, or its mean below floor."""
    squares = [dot(change, change) for change in changes]
    total = math.fsum(squares)
    if total == 0 or total / changes[0].numel() < floor:
        return [1 / len(changes)] * len(changes)
    return [square / total for square in squares]


def _erased(changes: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    positive = weighted_sum(changes, [1.0] * len(changes)) >= 0
    parts = [weight * change for weight, change in zip(weights, changes, strict=True)]
    return agreeing(parts, weights, positive)
