"""Merge methods that drop most of each change: TIES and DARE. Symbols: `merging.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fusion.tensors import (
    agreeing,
    floating,
    fraction,
    largest,
    ordered,
    ordering,
    shares,
    weighted_sum,
)

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
    from torch import Tensor

    from fusion.tensors import Whole

DIGIT = 16  # bits of a magnitude that one pass over the models settles


def ties_mergekit(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    weights: list[float] | None = None,
    density: float | list[float] = 1.0,
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    r"""Trim the changes, elect a sign for each element, average those that have it: TIES.

        trim:   τ'_i = τ_i on its max(1, ⌊density · size⌋) largest |τ_i|, else 0
        elect:  s = sign(Σ_i w_i τ'_i), a sum of 0 counting as +
        merge:  θ = θ_0 + scale · Σ_{i: sign(w_i τ'_i) = s} w_i τ'_i / Σ_{the same i} w_i

    `density` is one fraction in (0, 1], or one a model; of equal magnitudes the first are kept.
    Without `normalize` the sum is not divided.

    Source: TIES-Merging, 2306.01708, as mergekit 0.1.5 has it, with its defaults.
    Relative to the paper: trimmed in each tensor by itself where the paper ranks the whole model,
    so that tensors that hardly moved keep as much as others; the weights are mergekit's; ties of
    the election go to + where the authors' code follows the whole model's majority. The paper
    keeps the largest 20 % (density 0.2).
    """
    models, (given, fractions) = ordered(tensors, weights, _densities(density, len(tensors)))
    base = floating(base)
    parts = []
    for model, weight, share in zip(models, given, fractions, strict=True):
        change = model - base
        keep = max(1, int(share * change.numel()))
        parts.append(weight * change.where(largest(change.abs(), keep), 0))
    merged, surviving = agreeing(parts, given, weighted_sum(parts, [1.0] * len(parts)) >= 0)
    if normalize:
        merged = merged / surviving.where(surviving.abs() >= 1e-8, 1)
    return base + scale * merged


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
    base = floating(base)
    found = found or trim([("", tensors, base)], density=density)
    models, (thresholds,) = ordered(tensors, found.thresholds)
    parts = _trimmed(models, base, thresholds)
    total = weighted_sum(parts, [1.0] * len(parts))
    positive = (total >= 0) if found.positive else (total > 0)
    merged, agreeing_models = agreeing(parts, [1.0] * len(parts), positive)
    return base + scale * (merged / agreeing_models.clamp(min=1))


def _trimmed(models: Sequence[Tensor], base: Tensor, thresholds: Sequence[float]) -> list[Tensor]:
    changes = [model - base for model in models]
    pairs = zip(changes, thresholds, strict=True)
    return [change.where(change.abs() >= least, 0) for change, least in pairs]


def trim(whole: Whole, *, density: float = 0.2) -> Trim:
    """Thresholds of `ties_paper` over all tensors, exact, in memory that does not depend on them.

    A magnitude's bits, read as a whole number, order as it does: each pass counts one digit of 16
    bits among those that share the digits before. Two passes in float32, and one for the sign.
    """
    fraction("density", density)
    count, size = 0, 4
    for _, tensors, _ in whole:
        count += tensors[0].numel()
        size = max(size, tensors[0].element_size())
    if not count:
        return Trim([0.0] * max(1, _models(whole)), True)
    prefixes = [0] * _models(whole)
    left = [max(1, int(density * count))] * len(prefixes)
    for shift in range(8 * size - DIGIT, -1, -DIGIT):
        counts = np.zeros((len(prefixes), 1 << DIGIT), dtype=np.int64)
        for _, tensors, base in whole:
            for model, tensor in enumerate(tensors):
                bits = _magnitude_bits(tensor, base)
                bits = bits[(bits >> shift) >> DIGIT == prefixes[model]] >> shift
                digits = (bits & ((1 << DIGIT) - 1)).astype(np.int64)
                counts[model] += np.bincount(digits, minlength=1 << DIGIT)
        for model, row in enumerate(counts):
            above = np.cumsum(row[::-1])
            place = int(np.searchsorted(above, left[model]))
            left[model] -= int(above[place - 1]) if place else 0
            prefixes[model] = (prefixes[model] << DIGIT) | ((1 << DIGIT) - 1 - place)
    whole_number, real = (np.uint64, np.float64) if size == 8 else (np.uint32, np.float32)
    thresholds = [float(np.array(p, whole_number).view(real)) for p in prefixes]
    votes = 0
    for _, tensors, base in whole:
        zero = floating(base)
        models, (least,) = ordered(tensors, thresholds)
        parts = _trimmed(models, zero, least)
        votes += int(weighted_sum(parts, [1.0] * len(parts)).sign().double().sum())
    return Trim(thresholds, votes >= 0)


def _models(whole: Whole) -> int:
    return next((len(tensors) for _, tensors, _ in whole), 0)


def _magnitude_bits(tensor: Tensor, base: Tensor) -> np.ndarray:
    change = (floating(tensor) - floating(base)).abs_().reshape(-1).numpy()
    return change.view(np.uint64 if change.itemsize == 8 else np.uint32)


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
    tensor and its place alone (see `kept`).

    Source: DARE, 2311.03099, where p = 0.9 is often harmless.
    """
    draw = Draw(seed, name, models, start)
    parts, given = _dropped(tensors, base, weights, density, rescale, draw)
    chosen = shares(given) if normalize else given
    return floating(base) + scale * weighted_sum(parts, chosen)


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
    changes, given = _dropped(tensors, base, weights, density, rescale, draw)
    parts = [weight * change for weight, change in zip(given, changes, strict=True)]
    merged, surviving = agreeing(parts, given, weighted_sum(parts, [1.0] * len(parts)) >= 0)
    if normalize:
        merged = merged / surviving.where(surviving.abs() >= 1e-8, 1)
    return floating(base) + scale * merged


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
) -> tuple[list[Tensor], list[float]]:
    """τ'_i of DARE and the weights, models ordered by content."""
    if rescale not in ("probability", "none", "norm@mergekit"):
        known = "probability, none or norm@mergekit"
        raise ValueError(f"rescale is {rescale!r}; should be {known}")
    order, (given, fractions) = ordering(tensors, weights, _densities(density, len(tensors)))
    base = floating(base)
    keys = [str(place) for place in range(len(order))]
    if draw.models is not None:
        keys = _told_apart([draw.models[index] for index in order])
    parts = []
    for index, key, share in zip(order, keys, fractions, strict=True):
        change = floating(tensors[index]) - base
        part = change if share == 1 else change.where(kept(base, share, key, draw), 0)
        if rescale == "probability":
            part = part / share
        elif rescale == "norm@mergekit" and (left := float(part.abs().double().sum())):
            part = part * (float(change.abs().double().sum()) / left)
        parts.append(part)
    return parts, given


def kept(like: Tensor, density: float, model: str, draw: Draw) -> Tensor:
    """The elements of a tensor of that shape that a draw keeps.

    Draw number n of Philox, a counter-based generator, keyed by sha256(seed, model, tensor), is
    that of element n: whoever computes which part of a tensor, and when, does not matter.
    """
    import torch

    content = f"{draw.seed}\n{model}\n{draw.name}".encode()
    key = int.from_bytes(hashlib.sha256(content).digest()[:16], "little")
    generator = np.random.Philox(key=key)
    generator.advance(draw.start // 4)  # four draws a step of its counter
    uniform = np.random.Generator(generator).random(like.numel())
    return torch.from_numpy(uniform < density).reshape(like.shape)


def _densities(density: float | list[float], count: int) -> list[float]:
    fractions = density if isinstance(density, list) else [density] * count
    if len(fractions) != count:
        raise ValueError(f"{len(fractions)} densities for {count} models")
    return [fraction("density", share) for share in fractions]


def _told_apart(keys: Sequence[str]) -> list[str]:
    """The same, copies numbered, so that each has draws of its own."""
    return [f"{key}#{keys[:place].count(key)}" for place, key in enumerate(keys)]
