"""Sums, products and choices over the tensors of several models, the same to the last bit.

Not a bit depends on the order of the models or the number of threads. Symbols as in `merging.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cmp_to_key
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
    from torch import Tensor

# Several models' tensors of one name and the base's, over a model, or over the row blocks of one
# tensor; can be gone through again.
# The base may be None where a method has none.
Whole = Iterable[tuple[str, Sequence["Tensor"], Any]]
BLOCK = 32_768  # elements summed at once: torch never splits so few over threads


def floating(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.element_size() == 8 else tensor.float()


def ordered(
    tensors: Sequence[Tensor], *lists: Sequence[float] | None
) -> tuple[list[Tensor], list[list[float]]]:
    """The models, and what belongs to each (1 if nothing), ordered by content.

    Sums in floating point depend on their order; this takes the recipe's order out of them.
    """
    order, columns = ordering(tensors, *lists)
    return [floating(tensors[i]) for i in order], columns


def ordering(
    tensors: Sequence[Tensor], *lists: Sequence[float] | None
) -> tuple[list[int], list[list[float]]]:
    """Which model comes at each place of that order, and the ordered lists."""
    if not tensors:
        raise ValueError("no model to merge")
    for given in lists:
        if given is not None and len(given) != len(tensors):
            raise ValueError(f"{len(given)} weights for {len(tensors)} models")
    columns = [[1.0] * len(tensors) if given is None else list(given) for given in lists]
    models = [floating(tensor) for tensor in tensors]

    def compare(one: int, two: int) -> int:
        first, second = ([column[i] for column in columns] for i in (one, two))
        return _compare(models[one], models[two]) or (first > second) - (first < second)

    order = sorted(range(len(models)), key=cmp_to_key(compare))
    return order, [[column[i] for i in order] for column in columns]


def _compare(one: Tensor, two: Tensor) -> int:
    """-1, 0 or 1: lexicographic; reads no further than the first block that differs."""
    blocks = zip(one.reshape(-1).split(BLOCK), two.reshape(-1).split(BLOCK), strict=True)
    for a, b in blocks:
        if not a.equal(b):
            at = int((a != b).nonzero()[0])
            return 1 if a[at] > b[at] else -1
    return 0


def shares(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    if total == 0:
        raise ValueError("the weights add up to nothing")
    return [weight / total for weight in weights]


def fraction(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}; should be a fraction above 0, at most 1")
    return value


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i θ_i. A product and a sum, rounded each: fused, the ends of threads would differ."""
    out = weights[0] * tensors[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        out += weight * tensor
    return out


def dot(one: Tensor, two: Tensor) -> float:
    """⟨one, two⟩ in float64, in blocks that are the same for any number of threads."""
    pairs = zip(one.reshape(-1).split(BLOCK), two.reshape(-1).split(BLOCK), strict=True)
    return math.fsum(float((a.double() * b.double()).sum()) for a, b in pairs)


def largest(values: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` largest values; of equal ones the first in memory."""
    flat = values.reshape(-1)
    if keep >= flat.numel():
        return values.new_ones(values.shape).bool()
    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    mask, equal = flat > threshold, flat == threshold
    room = keep - int(mask.sum())
    return (mask | (equal & (equal.cumsum(0) <= room))).reshape(values.shape)


def agreeing(
    parts: Sequence[Tensor], weights: Sequence[float], positive: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the parts that have the elected sign, and of their weights, element by element."""
    total, surviving = positive.to(parts[0].dtype).zero_(), positive.to(parts[0].dtype).zero_()
    for part, weight in zip(parts, weights, strict=True):
        agrees = ((part > 0) & positive) | ((part < 0) & ~positive)
        total += part.where(agrees, 0)
        surviving += weight * agrees.to(surviving.dtype)
    return total, surviving
