"""Merge methods that drop most of each change: TIES and DARE. Symbols: `merging.py`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fusion.ranking import Least, Ranked, least_kept, magnitudes
from fusion.tensors import (
    Changes,
    Draws,
    changes,
    each,
    elected,
    flat,
    fraction,
    ordered,
    ordering,
    shaped,
    shares,
    summed,
)

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
    from torch import Tensor

    from fusion.tensors import Whole


def ties_mergekit(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weights: list[float] | None = None,
    density: float | list[float] = 1.0,
    scale: float = 1.0,
    normalize: bool = True,
    start: int = 0,
    found: Sequence[Least] | None = None,
) -> Tensor:
    r"""Trim the changes, elect a sign for each element, average those that have it: TIES.

        trim:   τ'_i = τ_i on its max(1, ⌊density · size⌋) largest |τ_i|, else 0
        elect:  s = sign(Σ_i w_i τ'_i), a sum of 0 counting as +
        merge:  θ = θ_0 + scale · Σ_{i: sign(w_i τ'_i) = s} w_i τ'_i / Σ_{the same i} w_i

    `density` is one fraction in (0, 1], or one a model; of equal magnitudes the first are kept.
    Without `normalize` the sum is not divided. `found` is what `largest_changes` gives over the
    tensor, by default this one.

    Source: TIES-Merging, 2306.01708, as mergekit 0.1.5 has it, with its defaults.
    Relative to the paper: trimmed in each tensor by itself where the paper ranks the whole model,
    so that tensors that hardly moved keep as much as others; the weights are mergekit's; ties of
    the election go to + where the authors' code follows the whole model's majority. The paper
    keeps the largest 20 % (density 0.2).
    """
    found = found or largest_changes([("", tensors, base)], density=density)
    order, (given,) = ordering(tensors, weights)
    parts = changes([tensors[index] for index in order], base)
    trimmed = [found[index] for index in order]
    leasts, rooms = [one.value for one in trimmed], [one.of(start) for one in trimmed]
    parts = parts._replace(leasts=leasts, rooms=rooms)
    floor = 1e-8 if normalize else math.inf
    return elected(parts, given, given, base, scale=scale, floor=floor)


def largest_changes(whole: Whole, *, density: float | list[float] = 1.0) -> list[Least]:
    """The smallest |τ| that `ties_mergekit` keeps of a tensor, a model each."""
    count = _models(whole)
    fractions = _densities(density, count)
    if all(share == 1 for share in fractions):
        return [Least(0.0)] * count
    out: list[tuple[int, Least]] = []
    for share in dict.fromkeys(fractions):  # models of one density together
        members = [index for index, one in enumerate(fractions) if one == share]

        def values(
            tensors: Sequence[Tensor], base: Tensor, of: list[int] = members
        ) -> list[Ranked]:
            ground = flat(base)
            return [(flat(tensors[i]), ground) for i in of]

        def keep(size: int, _: int, share: float = share) -> int:
            return max(1, int(share * size))

        least = least_kept(whole, values, keep)
        out += zip(members, least, strict=True)
    return [least for _, least in sorted(out, key=lambda pair: pair[0])]


class Trim(NamedTuple):
    """What TIES finds over a whole model: the smallest |τ| kept, a model each, and the majority."""

    thresholds: list[float]
    positive: bool  # which sign more elements elected


def ties_paper(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    found: Trim | None = None,
) -> Tensor:
    r"""Trim the changes of the whole model, elect a sign for each element, average: TIES.

        trim:   τ'_i = τ_i where |τ_i| is among the ⌊density · all⌋ largest of the model, else 0
        elect:  s = sign(Σ_i τ'_i); where it is 0, the sign that most elements elected
        merge:  θ = θ_0 + scale · mean of τ'_i over {i: sign(τ'_i) = s}

    `found` is what `trim` gives over all tensors, by default of this one; at least one element is
    kept, and all that equal the smallest kept one. The paper keeps 20 %.

    Source: TIES-Merging, 2306.01708, section 4. Relative to the authors' code: that keeps one
    element more a model (its test is ≥ the value before).
    """
    found = found or trim([("", tensors, base)], density=density)
    models, (thresholds,) = ordered(tensors, found.thresholds)
    parts = changes(models, base)._replace(leasts=thresholds)
    ones = [1.0] * len(models)
    return elected(parts, ones, ones, base, scale=scale, zero_is_positive=found.positive)


def trim(whole: Whole, *, density: float = 0.2) -> Trim:
    """Thresholds of `ties_paper` over all tensors, exact, and the sign that most elements elect."""
    fraction("density", density)

    def values(tensors: Sequence[Tensor], base: Tensor) -> list[Ranked]:
        ground = flat(base)
        return [(flat(tensor), ground) for tensor in tensors]

    def keep(size: int, _: int) -> int:
        return max(1, int(density * size))

    least = least_kept(whole, values, keep, together=True)
    thresholds = [one.value for one in least] or [0.0] * max(1, _models(whole))

    def votes(_: int, __: str, tensors: Sequence[Tensor], base: Tensor) -> int:
        models, (floors,) = ordered(tensors, thresholds)
        parts = changes(models, base)._replace(leasts=floors)
        total = summed(parts, [1.0] * len(models))
        return int(np.count_nonzero(total > 0)) - int(np.count_nonzero(total < 0))

    return Trim(thresholds, sum(each(whole, votes)) >= 0)


def _models(whole: Whole) -> int:
    return next((len(tensors) for _, tensors, _ in whole), 0)


def dare_linear(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weights: list[float] | None = None,
    density: float | list[float] = 0.1,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "probability",
    seed: int = 0,
    name: str = "",
    models: Sequence[str] | None = None,
    start: int = 0,
) -> Tensor:
    r"""Drop most of each change by chance, enlarge the rest, add: DARE with task arithmetic.

        τ'_i = m_i ⊙ τ_i / density,   m_i ~ Bernoulli(density) for each element
        θ = θ_0 + scale · Σ_i w_i τ'_i;   w_i = 1 if none are given

    density = 1 − p of the paper, one fraction in (0, 1], or one a model. With `normalize`, w_i is
    divided by Σ w_i. `rescale` is probability (1/density), none, or norm@mergekit (Σ|τ_i| /
    Σ|m_i ⊙ τ_i|, which depends on the draw). An element's draw depends on the seed, its model, its
    tensor and its place alone (see `_keyed`).

    Source: DARE, 2311.03099, where p = 0.9 is often harmless.
    """
    draw = Draw(seed, name, models, start)
    parts, given = _dropped(tensors, base, weights, density, rescale, draw)
    return shaped(summed(parts, shares(given) if normalize else given, scale, base), base)


def dare_ties(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weights: list[float] | None = None,
    density: float | list[float] = 0.1,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "probability",
    seed: int = 0,
    name: str = "",
    models: Sequence[str] | None = None,
    start: int = 0,
) -> Tensor:
    r"""Drop most of each change by chance, enlarge the rest, merge where signs agree.

    τ' and the parameters as in `dare_linear`; election and merge as in `ties_mergekit`, where
    `normalize` divides by the weights that survive.

    Source: DARE, 2311.03099, with TIES-Merging, 2306.01708.
    """
    draw = Draw(seed, name, models, start)
    parts, given = _dropped(tensors, base, weights, density, rescale, draw)
    floor = 1e-8 if normalize else math.inf
    return elected(parts, given, given, base, scale=scale, floor=floor)


class Draw(NamedTuple):
    """Which elements' draws are meant: of one tensor, from one place in it on."""

    seed: int
    name: str
    models: Sequence[str] | None  # what tells models apart; by default their order by content
    start: int  # the place of the first element in its tensor, a multiple of 4


def _dropped(
    tensors: Sequence[Tensor],
    base: Tensor,
    weights: Sequence[float] | None,
    density: float | list[float],
    rescale: str,
    draw: Draw,
) -> tuple[Changes, list[float]]:
    """τ'_i of DARE and the weights, models ordered by content."""
    if rescale not in ("probability", "none", "norm@mergekit"):
        known = "probability, none or norm@mergekit"
        raise ValueError(f"rescale is {rescale!r}; should be {known}")
    order, (given, fractions) = ordering(tensors, weights, _densities(density, len(tensors)))
    keys = [str(place) for place in range(len(order))]
    if draw.models is not None:
        keys = _told_apart([draw.models[index] for index in order])
    parts = changes([tensors[index] for index in order], base)
    words, streams = np.array([_keyed(draw, key) for key in keys], np.uint64).T.copy()
    bounds = np.array([math.ceil(share * 2**32) - 1 for share in fractions], np.uint32)
    factors = parts.real([1 / share if rescale == "probability" else 1.0 for share in fractions])
    draws = Draws(draw.start, bounds, words, streams, factors)
    if rescale == "norm@mergekit":
        for place, model in enumerate(parts.models):
            one = Draws(draws.first, *(column[place : place + 1] for column in draws[1:]))
            left = summed(Changes((model,), parts.base, draws=one), [1.0])
            if norm := _norm(left, None):
                factors[place] = _norm(model, parts.base) / norm
    return parts._replace(draws=draws), given


def _norm(model: np.ndarray, base: np.ndarray | None) -> float:
    """Σ |τ|."""
    return float(abs(magnitudes(model, base)).sum(dtype=np.float64))


def _keyed(draw: Draw, model: str) -> tuple[int, int]:
    """Key and stream of a model's draws in a tensor.

    Number n of Philox, a counter-based generator, keyed by sha256(seed, model, tensor), is the draw
    of element n: whoever computes which part of a tensor, and when, does not matter.
    """
    digest = hashlib.sha256(f"{draw.seed}\n{model}\n{draw.name}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _densities(density: float | list[float], count: int) -> list[float]:
    fractions = density if isinstance(density, list) else [density] * count
    if len(fractions) != count:
        raise ValueError(f"{len(fractions)} densities for {count} models")
    return [fraction("density", share) for share in fractions]


def _told_apart(keys: Sequence[str]) -> list[str]:
    """The same, copies numbered, so that each has draws of its own."""
    return [f"{key}#{keys[:place].count(key)}" for place, key in enumerate(keys)]
