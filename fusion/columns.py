"""WIDEN: weights of a merge from the norms and directions of columns. Symbols: `merging.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fusion.geometry import EMBEDDINGS
from fusion.tensors import (
    changes,
    each,
    flat,
    floating,
    ordered,
    ordering,
    shaped,
    weighted_sum,
)

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
    from torch import Tensor

    from fusion.tensors import Whole


class Columns(NamedTuple):
    """What WIDEN finds over a tensor, a model each: weights of its columns, or a vector's mean |τ|.

    A column is what one input meets: column of a matrix (out, in), row of an embedding.
    """

    weights: list[Tensor]
    means: list[float]


def widen(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    ratio: float = 1.0,
    calibration: float = 1.0,
    normalize: bool = False,
    name: str = "",
    start: int = 0,
    found: Columns | None = None,
) -> Tensor:
    r"""Weigh each column of each model by how much its norm and its direction changed: WIDEN.

        columns:  m = |W|, D = W / m;   Δm_i = |m_i − m_0|,   ΔD_i = 1 − cos(D_i, D_0)
        rank:     r = place among the columns of the same model / their number, in [0, 1)
        weigh:    s_i = softmax over the models of r, but `calibration` where r > ratio · mean(r)
        θ = θ_0 + Σ_i ½ (s_i of Δm + s_i of ΔD) · τ_i

    A column is what one input meets: column of a matrix (out, in), row of an embedding, known by
    `name`. For a vector s_i is that of |τ_i| itself, not ranked. The weights of a column need not
    add up to one; with `normalize` they are divided by their sum. `found` is what `column_changes`
    gives over the tensor, by default this one.

    Source: WIDEN, 2408.03092, its defaults. Relative to the paper: of equal changes the first
    column ranks lower, in all models alike; `normalize` is ours.
    """
    base = floating(base)
    if found is None:
        found = column_changes([(name, tensors, base)], ratio=ratio, calibration=calibration)
    rows = _flipped(name, base)
    if base.dim() < 2:
        moved = [(floating(tensor) - base).abs().reshape(-1) for tensor in tensors]
        weights = _calibrated(moved, found.means, ratio, calibration)
    else:
        first = start // max(1, base.shape[1]) if rows else 0
        stop = first + base.shape[0] if rows else None
        weights = [one[first:stop].to(base.dtype) for one in found.weights]
    if normalize:
        listed, _ = ordered(weights)
        total = weighted_sum(listed, [1.0] * len(listed))
        weights = [weight / total for weight in weights]
    return _weighed(tensors, base, weights, rows)


def _weighed(
    tensors: Sequence[Tensor], base: Tensor, weights: Sequence[Tensor], rows: bool
) -> Tensor:
    """θ_0 + Σ w_i τ_i, in an order that follows from the models' and the weights' content."""
    import numpy as np

    from fusion import loops

    among, _ = ordering(weights)
    order, _ = ordering(tensors, [float(among.index(place)) for place in range(len(tensors))])
    parts = changes([tensors[place] for place in order], base)
    given = np.stack([flat(weights[place]) for place in order])
    out = np.empty_like(parts.models[0])
    width = base.shape[1:].numel() if base.dim() > 1 else base.numel()
    loops.weigh(out, parts.models, parts.base, given, width, rows)
    return shaped(out, base)


def column_changes(whole: Whole, *, ratio: float = 1.0, calibration: float = 1.0) -> Columns:
    """Weights of a tensor's columns, before `normalize`, float64; of a vector the mean |τ|."""
    import torch

    pieces = list(each(whole, _sums))
    size = sum(piece.size for piece in pieces)
    if pieces[0].norms is None:
        moved = zip(*(piece.moved for piece in pieces), strict=True)
        return Columns([], [math.fsum(column) / max(1, size) for column in moved])
    sums = [piece.norms for piece in pieces if piece.norms is not None]
    if pieces[0].flipped:
        squares, inner = (torch.cat(parts, dim=-1) for parts in zip(*sums, strict=True))
    else:
        ones = [1.0] * len(sums)
        squares, inner = (weighted_sum(parts, ones) for parts in zip(*sums, strict=True))
    *norms, zero = squares.sqrt()
    by_norm, by_turn = [], []
    for norm, dot in zip(norms, inner[:-1], strict=True):
        both = norm * zero
        cosine = dot / both.where(both > 0, 1)
        by_norm.append(_ranks((norm - zero).abs()))
        by_turn.append(_ranks(1 - cosine.where(both > 0, 1)))
    weighed = []
    for ranks in (by_norm, by_turn):
        means = [float(r.sum()) / max(1, r.numel()) for r in ranks]
        weighed.append(_calibrated(ranks, means, ratio, calibration))
    return Columns([(a + b) / 2 for a, b in zip(*weighed, strict=True)], [])


class _Sums(NamedTuple):
    """Of one piece: sums over each column, or |τ| of each model if it is of a vector."""

    size: int
    flipped: bool
    norms: tuple[Tensor, Tensor] | None  # |W|², ⟨W, W_0⟩: models, then the base; by column
    moved: list[float]


def _sums(_: int, name: str, tensors: Sequence[Tensor], base: Any) -> _Sums:
    import torch

    from fusion import loops

    base = floating(base)
    if base.dim() < 2:
        moved = [math.fsum((floating(t) - base).abs().reshape(-1).tolist()) for t in tensors]
        return _Sums(base.numel(), False, None, moved)
    flipped, parts = _flipped(name, base), changes(tensors, base)
    sums = loops.columns(parts.models, parts.base, base.shape[1:].numel(), flipped)
    squares, inner = torch.from_numpy(sums)
    return _Sums(base.numel(), flipped, (squares, inner), [])


def _flipped(name: str, tensor: Tensor) -> bool:
    """Whether a matrix is an embedding."""
    return tensor.dim() == 2 and name.endswith(EMBEDDINGS)


def _ranks(values: Tensor) -> Tensor:
    """Place of each value among all, ascending, from 0 to below 1."""
    places = values.argsort(stable=True).argsort().double()
    return places / max(1, values.numel())


def _calibrated(
    values: Sequence[Tensor], means: Sequence[float], ratio: float, calibration: float
) -> list[Tensor]:
    """Softmax over the models; `calibration` where a value is above `ratio` times its mean."""
    powers = [value.exp() for value in values]
    listed, _ = ordered(powers)
    total = weighted_sum(listed, [1.0] * len(listed))
    triples = zip(values, powers, means, strict=True)
    return [
        (power / total).masked_fill(value > ratio * mean, calibration)
        for value, power, mean in triples
    ]
