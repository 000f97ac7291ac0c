"""Merge methods: combine the same tensor of several models into one.

A method is a plain function of (tensors, base) and its line in MERGE_METHODS at the foot; keyword
parameters can be given in a recipe. Tensors come in the recipe's order, in float32; which tensors,
from which files, is `checkpoints.py`.

Symbols: θ_i the models, θ_0 the base, τ_i = θ_i − θ_0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def linear(
    tensors: Sequence[Tensor], base: Tensor | None, *, weights: list[float] | None = None
) -> Tensor:
    """Weighted mean: Σ w_i θ_i / Σ w_i; equal if none are given (model soups, 2203.05482)."""
    shares = _shares(tensors, weights)
    return _sum([share * tensor for share, tensor in zip(shares, tensors, strict=True)])


def slerp(tensors: Sequence[Tensor], base: Tensor | None, *, t: float = 0.5) -> Tensor:
    r"""Two models along the great circle between them, tensor by tensor.

        θ = sin((1−t)Ω)/sin Ω · θ_1 + sin(tΩ)/sin Ω · θ_2,   cos Ω = ⟨θ_1, θ_2⟩ / (|θ_1| |θ_2|)

    Linear where |cos Ω| > 0.9995, since sin Ω then vanishes. Raises ValueError unless two are
    given.
    """
    if len(tensors) != 2:
        raise ValueError(f"slerp merges two models, not {len(tensors)}")
    one, two = (tensor.double() for tensor in tensors)
    norms = one.norm() * two.norm()
    cosine = (one * two).sum() / norms if norms > 0 else norms.new_ones(())
    if cosine.abs() > 0.9995:
        return ((1 - t) * one + t * two).float()
    angle = cosine.acos()
    return ((((1 - t) * angle).sin() * one + (t * angle).sin() * two) / angle.sin()).float()


def task_arithmetic(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weights: list[float] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Add the changes of all models: θ_0 + scale · Σ w_i τ_i, w_i = 1 if none (2212.04089)."""
    given = weights or [1.0] * len(tensors)
    _shares(tensors, given)
    return base + scale * _sum([w * (t - base) for w, t in zip(given, tensors, strict=True)])


def varm(tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    r"""Weigh each model by how far this tensor moved: VaRM (FuseChat, 2402.16107, section 3.3).

        θ = Σ_i w_i θ_i,   w_i = mean(τ_i²) / Σ_j mean(τ_j²)

    The base where no model moved.

    Relative to the paper: its formula, matrix by matrix; the released script reads one statistics
    file for all models, so that its weights come out equal.
    """
    moved = [float((tensor - base).double().pow(2).mean()) for tensor in tensors]
    total = sum(moved)
    if total == 0:
        return base.clone()
    return _sum([m / total * tensor for m, tensor in zip(moved, tensors, strict=True)])


def _shares(tensors: Sequence[Tensor], weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [1.0 / len(tensors)] * len(tensors)
    if len(weights) != len(tensors):
        raise ValueError(f"{len(weights)} weights for {len(tensors)} models")
    total = sum(weights)
    if total == 0:
        raise ValueError("the weights add up to nothing")
    return [w / total for w in weights]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    out = parts[0].clone()
    for part in parts[1:]:
        out += part
    return out


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """What a recipe may set for a merge method: its keyword-only parameters."""
    found = inspect.signature(MERGE_METHODS[name]).parameters
    return {key: p for key, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def needs_base(name: str) -> bool:
    """Whether a method works on changes against a base."""
    return "None" not in str(inspect.signature(MERGE_METHODS[name]).parameters["base"].annotation)


MERGE_METHODS: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "slerp": slerp,
    "task_arithmetic": task_arithmetic,
    "varm": varm,
}
