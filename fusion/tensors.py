"""Sums, products and choices over the tensors of several models, the same to the last bit.

Not a bit depends on the order of the models or the number of threads. Symbols as in `merging.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cmp_to_key
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
    import numpy as np
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


class Draws(NamedTuple):
    """Which elements are kept by chance: an element's draw is at most its model's bound."""

    first: int  # number of the first element's draw, a multiple of 4
    bounds: np.ndarray  # of 32 bits, as the draws
    keys: np.ndarray
    streams: np.ndarray
    factors: np.ndarray  # what is kept is multiplied by, of the elements' type


class Changes(NamedTuple):
    """τ_i of models, or of their elements whose rank, |τ_i| if None, is at least `leasts[i]`.

    Of those that equal it the first `rooms[i]`, or all if that is −1. In place of that, draws.
    """

    models: tuple[np.ndarray, ...]
    base: np.ndarray | None
    rank: np.ndarray | None = None
    leasts: Sequence[float] = ()  # 0 each by default
    rooms: Sequence[int] = ()  # −1 each by default
    draws: Draws | None = None

    @property
    def selection(self) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """As the compiled loops take it."""
        import numpy as np

        count = len(self.models)
        rooms = np.array(self.rooms or [-1] * count, dtype=np.int64)
        return self.rank, self.real(self.leasts or [0.0] * count), rooms

    def real(self, numbers: Sequence[float]) -> np.ndarray:
        """Numbers in the elements' own type."""
        import numpy as np

        return np.array(numbers, dtype=self.models[0].dtype)


def flat(tensor: Tensor) -> np.ndarray:
    """The elements of a tensor, at least float32, in their order, side by side in memory."""
    return floating(tensor.detach()).reshape(-1).contiguous().numpy()


def changes(models: Sequence[Tensor], base: Tensor | None) -> Changes:
    return Changes(tuple(map(flat, models)), None if base is None else flat(base))


def shaped(elements: np.ndarray, like: Tensor) -> Tensor:
    import torch

    return torch.from_numpy(elements).reshape(like.shape)


def weighted_sum(
    tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None
) -> Tensor:
    """Σ w_i (θ_i − θ_0), with θ_0 = 0 if no base is given. A product and a sum, rounded each."""
    return shaped(summed(changes(tensors, base), weights), tensors[0])


def summed(
    parts: Changes, weights: Sequence[float], scale: float = 1.0, base: Tensor | None = None
) -> np.ndarray:
    """θ_0 + scale · Σ w_i τ_i, with θ_0 = 0 if no base is given."""
    return _combined(parts, weights, weights, 0, (0.0, 1.0), scale, base)


def elected(
    parts: Changes,
    weights: Sequence[float],
    votes: Sequence[float],
    base: Tensor,
    *,
    scale: float = 1.0,
    floor: float = 1e-8,
    otherwise: float = 1.0,
    zero_is_positive: bool = True,
) -> Tensor:
    """θ_0 + scale · Σ w_i τ_i / Σ w_i over the models whose w_i τ_i has the sign of Σ votes_i τ_i.

    Where |Σ w_i| is below `floor`, it is divided by `otherwise`; an infinite floor divides nothing.
    """
    elect = 1 if zero_is_positive else -1
    found = _combined(parts, weights, votes, elect, (floor, otherwise), scale, base)
    return shaped(found, base)


def _combined(
    parts: Changes,
    weights: Sequence[float],
    votes: Sequence[float],
    elect: int,
    division: tuple[float, float],
    scale: float,
    base: Tensor | None,
) -> np.ndarray:
    import numpy as np

    from fusion import loops

    out = np.empty_like(parts.models[0])
    given = (parts.models, parts.base, *parts.selection, parts.draws and tuple(parts.draws))
    numbers = parts.real(weights), parts.real(votes)
    floor, otherwise, factor = parts.real([*division, scale])
    onto = None if base is None else flat(base)
    loops.combine(out, *given, *numbers, elect, floor, otherwise, factor, onto)
    return out


def each(whole: Whole, work: Callable[..., Any]) -> Iterator[Any]:
    """work(place of its first element, name, models, base) of each piece, in order.

    Side by side if the pieces know how; else each is a whole tensor.
    """
    side_by_side = getattr(whole, "map", None)
    return side_by_side(work) if side_by_side else (work(0, *part) for part in whole)


def inner_products(tensors: Sequence[Tensor], base: Tensor | None = None) -> list[list[float]]:
    """⟨τ_i, τ_j⟩ of all pairs in float64; τ_i is the tensor itself if no base is given."""
    from fusion import loops

    parts = changes(tensors, base)
    found: list[list[float]] = loops.products(parts.models, parts.base).tolist()
    return found


def squares(parts: Changes) -> list[float]:
    """Σ τ_i² in float64, over what the changes are of."""
    from fusion import loops

    found: list[float] = loops.squares(parts.models, parts.base, *parts.selection).tolist()
    return found
