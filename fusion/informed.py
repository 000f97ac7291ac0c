"""Merge methods that weigh by statistics of each model on a corpus. Symbols: `merging.py`.

The statistics are collected and kept by `statistics.py`; how much of the corpus they are from is a
parameter here, so that a recipe sets it like any other. Without statistics both methods are means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fusion.means import linear
from fusion.tensors import floating, ordering

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
    from torch import Tensor


def fisher(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    *,
    weights: list[float] | None = None,
    floor: float = 1e-6,
    blocks: int = 8,
    labels: str = "data",
    statistics: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""Weigh each model, element by element, by its diagonal Fisher information.

        θ = Σ_i w_i F_i θ_i / Σ_i w_i F_i

    `statistics`: F_i ≥ 0, in the tensors' shape, as `statistics.collect` gives it on `blocks`
    blocks of the corpus with `labels`. F_i below `floor` counts as `floor`, so that an element no
    text reached is the weighted mean; files give F in units of its mean over all elements and
    models. w_i = 1 if none are given. Raises ValueError for a floor that is not above 0, weights
    that are negative or add up to nothing, or unknown labels.

    Source: Matena and Raffel, 2111.09832. Relative to the paper: there labels are drawn from the
    model (`labels: model`) or, for one-hot problems, all are gone through; the default here is the
    empirical Fisher, with the labels of the text. Its floor of 1e-6 is absolute, which for a causal
    LM's small values would make the merge a mean.
    """
    if not floor > 0:
        raise ValueError(f"floor is {floor}; should be above 0")
    if labels not in ("data", "model"):
        raise ValueError(f"labels is {labels!r}; should be data or model")
    if weights is not None and (min(weights, default=0) < 0 or math.fsum(weights) <= 0):
        raise ValueError(f"weights are {weights}; should be at least 0, and one above")
    if statistics is None:
        return linear(tensors, base, weights=weights)
    models, information, given = _ordered(tensors, statistics, weights)
    first = models[0]
    total, moved = first.new_zeros(first.shape), first.new_zeros(first.shape)
    for model, found, weight in zip(models, information, given, strict=True):
        part = weight * found.clamp_min(floor)
        total += part
        moved += part * (model - first)
    return first + moved / total


def regmean(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    *,
    scaling: float = 0.9,
    blocks: int = 8,
    statistics: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""Fit each linear layer to the outputs of all models on their inputs: RegMean.

        W = (Σ_i W_i G̃_i)(Σ_i G̃_i)⁻¹,   G_i = X_iᵀ X_i

    for weights W (out, in) as stored. G̃ is G with everything off its diagonal times `scaling`, the
    paper's α. `statistics`: G_i (in, in), X_i the layer's inputs on `blocks` blocks of the corpus,
    a row a token. Inputs, or directions of them, that never occurred take the mean of the models.
    Tensors without statistics (embeddings, norms, biases, a tied head) are averaged. Computed in
    float64 on one thread. Raises ValueError for a scaling outside [0, 1].

    Source: RegMean, 2212.09849. Relative to the paper: there each model's inputs are its own
    training data; here all models read the recipe's one corpus.
    """
    if not 0 <= scaling <= 1:
        raise ValueError(f"scaling is {scaling}; should be in [0, 1]")
    if statistics is None:
        return linear(tensors, base)
    models, grams, _ = _ordered(tensors, statistics, None)
    with _one_thread():
        first = models[0].double()
        mean = first + sum((model.double() - first) / len(models) for model in models[1:])
        total = mean.new_zeros(grams[0].shape)
        moved = mean.new_zeros(mean.shape)
        for model, gram in zip(models, grams, strict=True):
            scaled = scaling * gram.double()
            scaled.diagonal().copy_(gram.diagonal())
            total += scaled
            moved += (model.double() - mean) @ scaled
        return (mean + _divided(moved, total, scaling < 1)).to(models[0].dtype)


def _divided(moved: Tensor, total: Tensor, definite: bool) -> Tensor:
    """moved · total⁻¹, 0 along what total does not hold; `definite` but for its empty rows."""
    import torch

    if definite:
        diagonal = total.diagonal()
        diagonal[diagonal == 0] = 1  # `moved` is 0 there, too
        factor, failed = torch.linalg.cholesky_ex(total)
        if not failed:
            return torch.cholesky_solve(moved.T, factor).T
    # Sums of float32 rows: what is smaller than their rounding is not there.
    tolerance = len(total) * torch.finfo(torch.float32).eps
    return moved @ torch.linalg.pinv(total, rtol=tolerance, hermitian=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrix products and solutions whose bits do not depend on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ordered(
    tensors: Sequence[Tensor], statistics: Sequence[Tensor], weights: list[float] | None
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Models, their statistics and weights, ordered by the content of both."""
    import torch

    pairs = zip(tensors, statistics, strict=True)
    both = [torch.cat([floating(a).reshape(-1), floating(b).reshape(-1)]) for a, b in pairs]
    order, (given,) = ordering(both, weights)
    models = [floating(tensors[i]) for i in order]
    return models, [floating(statistics[i]) for i in order], given
