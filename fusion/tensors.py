"""Sums, products and choices over the tensors of several models, the same to the last bit.

Not a bit depends on the order of the models or the number of threads. Symbols as in `merging.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    first, second = one.reshape(-1), two.reshape(-1)
    a, b = first[:8].tolist(), second[:8].tolist()
    if a != b:
        return 1 if a > b else -1
    for a, b in zip(first.split(BLOCK), second.split(BLOCK), strict=True):
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
    import torch

    out = weights[0] * tensors[0]
    part = None
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        if weight == 1:
            out += tensor
        else:
            part = torch.mul(tensor, weight, out=part)
            out += part
    return out


def each(whole: Whole, work: Callable[..., Any]) -> Iterator[Any]:
    """work(place of its first element, name, models, base) of each piece, in order.

    Side by side if the pieces know how; else each is a whole tensor.
    """
    side_by_side = getattr(whole, "map", None)
    return side_by_side(work) if side_by_side else (work(0, *part) for part in whole)


def inner_products(tensors: Sequence[Tensor]) -> list[list[float]]:
    """⟨x_i, x_j⟩ of all pairs in float64, in blocks that are the same for any number of threads."""
    sums: list[list[list[float]]] = [[[] for _ in tensors] for _ in tensors]
    for parts in zip(*(t.reshape(-1).split(BLOCK) for t in tensors), strict=True):
        wide = [part.double() for part in parts]
        for one, first in enumerate(wide):
            for two in range(one, len(wide)):
                sums[one][two].append(float((first * wide[two]).sum()))
    upper = [[math.fsum(cell) for cell in row] for row in sums]
    return [[upper[min(i, j)][max(i, j)] for j in range(len(upper))] for i in range(len(upper))]


def dot(one: Tensor, two: Tensor) -> float:
    """⟨one, two⟩ in float64, in blocks that are the same for any number of threads."""
    pairs = zip(one.reshape(-1).split(BLOCK), two.reshape(-1).split(BLOCK), strict=True)
    return math.fsum(float((a.double() * b.double()).sum()) for a, b in pairs)


def agreeing(
    parts: Sequence[Tensor], weights: Sequence[float], total: Tensor, zero_is_positive: bool = True
) -> tuple[Tensor, Tensor]:
    """Sum of the parts that have the sign of `total`, and of their weights, element by element.

    Parts are turned so that the elected sign is plus: what is then above zero has it.
    """
    import torch

    half = 0.5 if zero_is_positive else -0.5
    sign = total.sign().add_(half).sign_()
    merged, surviving = torch.zeros_like(total), torch.zeros_like(total)
    turned = torch.empty_like(total)
    for part, weight in zip(parts, weights, strict=True):
        merged += torch.mul(part, sign, out=turned).clamp_(min=0)
        agrees = turned.sign_()
        surviving += agrees if weight == 1 else agrees.mul_(weight)
    return merged.mul_(sign), surviving


def divided(total: Tensor, weights: Tensor, least: float) -> Tensor:
    """total / weights in place, and total where the weights are less than `least`, or nothing."""
    if float(weights.min() if weights.numel() else 0) < 0:
        return total.div_(weights.masked_fill_(weights.abs() < least, 1))
    return total.div_(weights.clamp_(min=least))
