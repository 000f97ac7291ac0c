"""Merge methods that are weighted means or sums. Symbols: `merging.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fusion.tensors import (
    changes,
    each,
    floating,
    ordered,
    shaped,
    shares,
    squares,
    summed,
    weighted_sum,
)

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
    from torch import Tensor

    from fusion.tensors import Whole


def linear(
    tensors: Sequence[Tensor], base: Tensor | None, *, weights: list[float] | None = None
) -> Tensor:
    """Weighted mean: θ = Σ w_i θ_i / Σ w_i; equal weights if none are given.

    Raises ValueError for a wrong number of weights, or weights that add up to nothing.
    Source: model soups, 2203.05482 (the uniform soup, with weights).
    """
    models, (given,) = ordered(tensors, weights)
    return weighted_sum(models, shares(given))


def task_arithmetic(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weights: list[float] | None = None,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Add the changes of all models: θ = θ_0 + scale · Σ w_i τ_i; w_i = 1 if none are given.

    With `normalize`, w_i is divided by Σ w_i, which makes it `linear` for scale 1. Raises
    ValueError as `linear` does.
    Source: editing with task arithmetic, 2212.04089; its λ is `scale`.
    """
    models, (given,) = ordered(tensors, weights)
    chosen = shares(given) if normalize else given
    return shaped(summed(changes(models, base), chosen, scale, base), base)


def varm(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    granularity: str = "matrix",
    name: str = "",
    found: Mapping[str, Sequence[float]] | None = None,
) -> Tensor:
    r"""Weigh each model by how far its weights moved: VaRM.

        θ = Σ_i w_i θ_i,   w_i = mean(τ_i²) / Σ_j mean(τ_j²)

    The means are over this tensor (`granularity: matrix`), over all tensors of its numbered layer
    (layer; a tensor outside the layers is by itself), or over the whole model (model). The base
    where no model moved. `found` is what `squared_changes` gives, by default of this tensor.
    Raises ValueError for another granularity.

    Source: FuseChat, 2402.16107. Relative to the paper: its formula; the released
    script reads one statistics file for all models, so that its weights come out equal.
    """
    base = floating(base)
    if found is None:
        found = squared_changes([(name, tensors, base)], granularity=granularity)
    models, (moved,) = ordered(tensors, found[_group(name, granularity)])
    return weighted_sum(models, shares(moved)) if any(moved) else base.clone()


def squared_changes(whole: Whole, *, granularity: str = "matrix") -> dict[str, list[float]]:
    """Σ τ_i² of each model over the tensors that share their weights, by their common name."""
    sums: dict[str, list[float]] = {}

    def moved(_: int, name: str, tensors: Sequence[Tensor], base: Tensor) -> tuple[str, list]:
        return _group(name, granularity), squares(changes(tensors, base))

    for group, found in each(whole, moved):
        before = sums.get(group, [0.0] * len(found))
        sums[group] = [a + b for a, b in zip(before, found, strict=True)]
    return sums


def _group(name: str, granularity: str) -> str:
    if granularity not in ("matrix", "layer", "model"):
        raise ValueError(f"granularity is {granularity!r}; should be matrix, layer or model")
    if granularity == "model":
        return ""
    layer = re.match(r".*?\.\d+(?=\.)", name) if granularity == "layer" else None
    return layer.group() if layer else name
