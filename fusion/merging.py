"""Merge methods: combine the same tensor of several models into one.

A method is a plain function of (tensors, base) and its line in MERGE_METHODS at the foot; its
keyword parameters can be given in a recipe. Which tensors, from which files, is `checkpoints.py`.

Symbols: θ_i the models in the recipe's order, θ_0 the base, τ_i = θ_i − θ_0, M models, w_i weights.
All tensors of one call have one shape, any; the result has it, too. It is float32 (float64 where
float64 was given), and not a bit of it depends on the order of the models or the number of threads.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cmp_to_key
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
    from torch import Tensor

BLOCK = 32_768  # elements summed at once: torch never splits so few over threads
_NO_MASS = 1e-6  # mergekit's: less mean square change than this counts as none


def linear(
    tensors: Sequence[Tensor], base: Tensor | None, *, weights: list[float] | None = None
) -> Tensor:
    """Weighted mean: θ = Σ w_i θ_i / Σ w_i; equal weights if none are given.

    Raises ValueError for a wrong number of weights, or weights that add up to nothing.
    Source: model soups, 2203.05482 (the uniform soup, with weights).
    """
    models, (given,) = _ordered(tensors, weights)
    return _sum(models, _shares(given))


def slerp(tensors: Sequence[Tensor], base: Tensor | None, *, t: float = 0.5) -> Tensor:
    r"""Two models along the great circle between them, tensor by tensor.

        θ = sin((1−t)Ω)/sin Ω · θ_1 + sin(tΩ)/sin Ω · θ_2,   cos Ω = ⟨θ_1, θ_2⟩ / (|θ_1| |θ_2|)

    Norms and angle are those of the flattened tensors, which are not normalised. Linear where
    |cos Ω| > 0.9995, since sin Ω then vanishes. Raises ValueError unless two models are given.

    Source: Shoemake 1985. Relative to the paper: that is about unit quaternions; weights as
    vectors, and the threshold, are the merging tools' custom.
    """
    if len(tensors) != 2:
        raise ValueError(f"slerp merges two models, not {len(tensors)}")
    if not 0 <= t <= 1:
        raise ValueError(f"t is {t}; should be between 0 (the first model) and 1 (the second)")
    one, two = (_float(tensor) for tensor in tensors)
    norms = math.sqrt(_dot(one, one) * _dot(two, two))
    cosine = _dot(one, two) / norms if norms > 0 else 1.0
    if abs(cosine) > 0.9995:
        return _sum([one, two], [1 - t, t])
    angle = math.acos(cosine)
    shares = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return _sum([one, two], shares)


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
    models, (given,) = _ordered(tensors, weights)
    shares = _shares(given) if normalize else given
    base = _float(base)
    return base + scale * _sum([model - base for model in models], shares)


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
    shares = density if isinstance(density, list) else [density] * len(tensors)
    if len(shares) != len(tensors):
        raise ValueError(f"{len(shares)} densities for {len(tensors)} models")
    models, (given, shares) = _ordered(tensors, weights, shares)
    base = _float(base)
    parts = []
    for model, weight, share in zip(models, given, shares, strict=True):
        change = model - base
        keep = max(1, int(_fraction("density", share) * change.numel()))
        parts.append(weight * change.where(_largest(change.abs(), keep), 0))
    merged, surviving = _agreeing(parts, given, _sum(parts, [1.0] * len(parts)) >= 0)
    if normalize:
        merged = merged / surviving.where(surviving.abs() >= 1e-8, 1)
    return base + scale * merged


def sce_paper(tensors: Sequence[Tensor], base: Tensor, *, select_topk: float = 0.1) -> Tensor:
    r"""Select, calculate, erase (SCE), as the paper has it.

        select:     τ'_i = τ_i where Var_i(τ_i) is among the largest, else 0
        calculate:  w_i = Σ τ'_i² / Σ_j Σ τ'_j², one weight a tensor
        erase:      s = sign(Σ_i τ'_i), a sum of 0 counting as +
        θ = θ_0 + Σ_{i: sign(τ'_i) = s} w_i τ'_i

    `select_topk` is the fraction selected of the elements whose variance is not zero, at least
    one; 1 selects everything. Where the models agree everywhere, everything is selected, so copies
    merge to the copy.

    Source: FuseChat, 2408.07990, equations 5-9; τ = 10 % as for FuseChat-7B-v2.0.
    Relative to the paper: it takes τ % of all elements; those without variance would be drawn by
    chance, so they do not count here.
    """
    models, base, chosen = _selected(tensors, base, select_topk, least=1)
    changes = [(model - base).where(chosen, 0) for model in models]
    return base + _erased(changes, _energies(changes))[0]


def sce_mergekit(tensors: Sequence[Tensor], base: Tensor, *, select_topk: float = 1.0) -> Tensor:
    r"""Select, calculate, erase, as mergekit 0.1.5 has it, with its default.

        θ = θ_0 + Σ_{i: sign(τ'_i) = s} w_i τ'_i / max(1e-6, Σ_{the same i} w_i)

    τ', w and s as in `sce_paper`. Relative to the paper: divides by the weights that survive; and
    all w_i are equal where Σ_i mean(τ'_i²) < 1e-6, which light fine-tuning often stays below. The
    base where nothing is selected, so for select_topk < 1 copies merge to the base.
    """
    models, base, chosen = _selected(tensors, base, select_topk, least=0)
    changes = [(model - base).where(chosen, 0) for model in models]
    merged, surviving = _erased(changes, _energies(changes, floor=_NO_MASS))
    return base + merged / surviving.clamp(min=_NO_MASS)


def sce_fusechat(tensors: Sequence[Tensor], base: Tensor, *, select_topk: float = 0.1) -> Tensor:
    r"""Select, calculate, erase, as the code released with FuseChat has it.

        θ = θ_0 + Σ_{i: sign(τ_i) = s} w_i τ_i / Σ_{the same i} w_i,   s = sign(Σ_i τ_i)

    w as in `sce_paper`. Relative to the paper: the selection decides the weights only, all elements
    are merged, and the sum is divided by the weights that survive.
    """
    models, base, chosen = _selected(tensors, base, select_topk, least=0)
    changes = [model - base for model in models]
    weights = _energies([change.where(chosen, 0) for change in changes])
    merged, surviving = _erased(changes, weights)
    return base + merged / surviving.where(surviving > 0, 1)


def varm(tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    r"""Weigh each model by how far this tensor moved: VaRM, matrix by matrix.

        θ = Σ_i w_i θ_i,   w_i = mean(τ_i²) / Σ_j mean(τ_j²)

    The base where no model moved.

    Source: FuseChat, 2402.16107. Relative to the paper: its formula; the released
    script reads one statistics file for all models, so that its weights come out equal.
    """
    models, _ = _ordered(tensors, None)
    base = _float(base)
    moved = [_dot(model - base, model - base) for model in models]
    return _sum(models, _shares(moved)) if any(moved) else base.clone()


def _float(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.element_size() == 8 else tensor.float()


def _ordered(
    tensors: Sequence[Tensor], *lists: Sequence[float] | None
) -> tuple[list[Tensor], list[list[float]]]:
    """The models, and what belongs to each (1 if nothing), ordered by content.

    Sums in floating point depend on their order; this takes the recipe's order out of them.
    """
    if not tensors:
        raise ValueError("no model to merge")
    for given in lists:
        if given is not None and len(given) != len(tensors):
            raise ValueError(f"{len(given)} weights for {len(tensors)} models")
    columns = [[1.0] * len(tensors) if given is None else list(given) for given in lists]
    models = [_float(tensor) for tensor in tensors]

    def compare(one: int, two: int) -> int:
        first, second = ([column[i] for column in columns] for i in (one, two))
        return _compare(models[one], models[two]) or (first > second) - (first < second)

    order = sorted(range(len(models)), key=cmp_to_key(compare))
    return [models[i] for i in order], [[column[i] for i in order] for column in columns]


def _compare(one: Tensor, two: Tensor) -> int:
    """-1, 0 or 1: lexicographic; reads no further than the first block that differs."""
    blocks = zip(one.reshape(-1).split(BLOCK), two.reshape(-1).split(BLOCK), strict=True)
    for a, b in blocks:
        if not a.equal(b):
            at = int((a != b).nonzero()[0])
            return 1 if a[at] > b[at] else -1
    return 0


def _shares(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    if total == 0:
        raise ValueError("the weights add up to nothing")
    return [weight / total for weight in weights]


def _fraction(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}; should be a fraction above 0, at most 1")
    return value


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i θ_i. A product and a sum, rounded each: fused, the ends of threads would differ."""
    out = weights[0] * tensors[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        out += weight * tensor
    return out


def _dot(one: Tensor, two: Tensor) -> float:
    """⟨one, two⟩ in float64, in blocks that are the same for any number of threads."""
    pairs = zip(one.reshape(-1).split(BLOCK), two.reshape(-1).split(BLOCK), strict=True)
    return math.fsum(float((a.double() * b.double()).sum()) for a, b in pairs)


def _largest(values: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` largest values; of equal ones the first in memory."""
    flat = values.reshape(-1)
    if keep >= flat.numel():
        return values.new_ones(values.shape).bool()
    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    mask, equal = flat > threshold, flat == threshold
    room = keep - int(mask.sum())
    return (mask | (equal & (equal.cumsum(0) <= room))).reshape(values.shape)


def _selected(
    tensors: Sequence[Tensor], base: Tensor, share: float, least: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Ordered models, base, and the mask of the share that varies most over the models.

    Variance is taken about the first model rather than the base: it is the same, and exactly zero
    where models agree. If none varies, all are selected where `least` asks for any at all.
    """
    _fraction("select_topk", share)
    models, _ = _ordered(tensors, None)
    if share == 1:
        return models, _float(base), base.new_ones(base.shape).bool()
    mean = _sum([model - models[0] for model in models], [1 / len(models)] * len(models))
    variance = mean.new_zeros(mean.shape)
    for model in models:
        variance += (model - models[0] - mean).square()
    varied = int((variance > 0).sum())
    keep = max(int(varied * share), least) if varied else least * variance.numel()
    chosen = _largest(variance, keep) if keep else variance.new_zeros(variance.shape).bool()
    return models, _float(base), chosen


def _energies(changes: Sequence[Tensor], floor: float = 0.0) -> list[float]:
    """Each model's share of the squared change; equal where it is zero, or its mean below floor."""
    squares = [_dot(change, change) for change in changes]
    total = math.fsum(squares)
    if total == 0 or total / changes[0].numel() < floor:
        return [1 / len(changes)] * len(changes)
    return [square / total for square in squares]


def _erased(changes: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    positive = _sum(changes, [1.0] * len(changes)) >= 0
    parts = [weight * change for weight, change in zip(weights, changes, strict=True)]
    return _agreeing(parts, weights, positive)


def _agreeing(
    parts: Sequence[Tensor], weights: Sequence[float], positive: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the parts that have the elected sign, and of their weights, element by element."""
    total, surviving = positive.to(parts[0].dtype).zero_(), positive.to(parts[0].dtype).zero_()
    for part, weight in zip(parts, weights, strict=True):
        agrees = ((part > 0) & positive) | ((part < 0) & ~positive)
        total += part.where(agrees, 0)
        surviving += weight * agrees.to(surviving.dtype)
    return total, surviving


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
    "ties@mergekit": ties_mergekit,
    "sce": sce_paper,
    "sce@paper": sce_paper,
    "sce@mergekit": sce_mergekit,
    "sce@fusechat": sce_fusechat,
    "varm": varm,
}
