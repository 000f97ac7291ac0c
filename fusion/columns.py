"""WIDEN: weights of a merge from the norms and directions of columns. Symbols: `merging.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fusion.geometry import EMBEDDINGS
from fusion.tensors import each, floating, ordered, weighted_sum

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
    changes = [floating(tensor) - base for tensor in tensors]
    if base.dim() < 2:
        weights = _calibrated([change.abs() for change in changes], found.means, ratio, calibration)
    else:
        shape, first = (1, *base.shape[1:]), 0
        if _flipped(name, base):
            shape, first = (-1, 1), start // max(1, base.shape[1])
        stop = first + base.shape[0] if first or shape[0] == -1 else None
        weights = [one[first:stop].to(base.dtype).reshape(shape) for one in found.weights]
    if normalize:
        listed, _ = ordered(weights)
        total = weighted_sum(listed, [1.0] * len(listed))
        weights = [weight / total for weight in weights]
    parts, _ = ordered([change.mul_(w) for change, w in zip(changes, weights, strict=True)])
    return weighted_sum(parts, [1.0] * len(parts)).add_(base)


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
    zero, *norms = squares.sqrt()
    by_norm, by_turn = [], []
    for norm, dot in zip(norms, inner, strict=True):
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
    norms: tuple[Tensor, Tensor] | None  # |W_0|² and |W_i|²; ⟨W_i, W_0⟩; columns last
    moved: list[float]


def _sums(_: int, name: str, tensors: Sequence[Tensor], base: Any) -> _Sums:
    import torch

    base = floating(base)
    if base.dim() < 2:
        moved = [math.fsum((floating(t) - base).abs().reshape(-1).tolist()) for t in tensors]
        return _Sums(base.numel(), False, None, moved)
    flipped = _flipped(name, base)
    over = 1 if flipped else 0
    zero = base.flatten(1).double()
    squares, inner = [zero.square().sum(over)], []
    for tensor in tensors:
        one = tensor.flatten(1).double()
        inner.append((one * zero).sum(over))
        squares.append(one.square().sum(over))
    return _Sums(base.numel(), flipped, (torch.stack(squares), torch.stack(inner)), [])


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
