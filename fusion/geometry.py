"""Merge methods of angles and norms. Symbols: `merging.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fusion.tensors import each, floating, inner_products, ordered, ordering, shares, weighted_sum

if TYPE_CHECKING:  # a recipe is checked against the signatures below without waiting for torch
    from torch import Tensor

    from fusion.tensors import Whole

Products = Sequence[Sequence[float]]  # ⟨x_i, x_j⟩, models by models, float64
EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")


def slerp(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    *,
    t: float = 0.5,
    found: Products | None = None,
) -> Tensor:
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
    products = found or model_products([("", tensors, base)])
    norms = math.sqrt(products[0][0] * products[1][1])
    cosine = products[0][1] / norms if norms > 0 else 1.0
    parts = [1 - t, t]
    if abs(cosine) <= 0.9995:
        angle = math.acos(cosine)
        parts = [math.sin(part * angle) / math.sin(angle) for part in parts]
    return weighted_sum([floating(tensor) for tensor in tensors], parts)


def karcher(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    *,
    weights: list[float] | None = None,
    tolerance: float = 1e-14,
    found: Products | None = None,
) -> Tensor:
    r"""The mean of the models' directions on the sphere, times the mean of their norms.

        u ← exp_u(Σ_i w_i log_u(u_i)),   u_i = θ_i / |θ_i|,   log_u(v) = Ω / sin Ω · (v − cos Ω · u)

    from u = Σ w_i u_i normalised, until a step would be shorter than `tolerance` (100 at most);
    θ = u · Σ w_i |θ_i|, with Σ w_i = 1, equal if not given. For two models of one norm and t = ½
    it is `slerp`. A model that is 0 has no direction and only shortens the mean. Where directions
    cancel, the mean is linear. Raises ValueError for a wrong number of weights, or weights below 0
    or all 0.

    Source: Karcher 1977. u stays within the span of the u_i, so only inner products are
    needed, which are taken in float64: in float32 the angle between close models is noise.
    mergekit's tolerance is 1e-5, which leaves the mean some 1e-6 off.
    """
    products = found or model_products([("", tensors, base)])
    order, (given,) = ordering(tensors, weights)
    if min(given) < 0:
        raise ValueError(f"weights are {weights}; should be 0 or more")
    part = shares(given)
    norms = [math.sqrt(products[i][i]) for i in order]
    cosines = [
        [
            products[i][j] / (norms[a] * norms[b]) if norms[a] and norms[b] else 0.0
            for b, j in enumerate(order)
        ]
        for a, i in enumerate(order)
    ]
    mean = math.fsum(w * n for w, n in zip(part, norms, strict=True))
    place = _mean_direction(
        [w if n else 0.0 for w, n in zip(part, norms, strict=True)], cosines, tolerance
    )
    models = [floating(tensors[i]) for i in order]
    if place is None:
        return weighted_sum(models, part)
    factors = [mean * c / n if n else 0.0 for c, n in zip(place, norms, strict=True)]
    return weighted_sum(models, factors)


def _mean_direction(
    weights: list[float], cosines: list[list[float]], tolerance: float
) -> list[float] | None:
    """Coefficients of the mean direction in the u_i; None if there is no telling."""

    def against(place: Sequence[float]) -> list[float]:
        return [math.fsum(c * p for c, p in zip(row, place, strict=True)) for row in cosines]

    def normal(place: Sequence[float]) -> list[float] | None:
        square = math.fsum(p * c for p, c in zip(place, against(place), strict=True))
        return [p / math.sqrt(square) for p in place] if square > 1e-12 else None

    place = normal(weights)
    for _ in range(100):
        if place is None:
            return None
        near = [min(1.0, max(-1.0, cosine)) for cosine in against(place)]
        if min(near) <= -1 + 1e-12:
            return None
        angles = [math.acos(cosine) for cosine in near]
        pulls = [
            w * (a / math.sin(a) if a > 1e-6 else 1.0) for w, a in zip(weights, angles, strict=True)
        ]
        along = math.fsum(pull * cosine for pull, cosine in zip(pulls, near, strict=True))
        step = [pull - along * p for pull, p in zip(pulls, place, strict=True)]
        square = math.fsum(s * c for s, c in zip(step, against(step), strict=True))
        length = math.sqrt(max(0.0, square))
        if length < tolerance:
            break
        turn = math.sin(length) / length
        moved = [p * math.cos(length) + s * turn for p, s in zip(place, step, strict=True)]
        place = normal(moved)
    return place


def model_stock(
    tensors: Sequence[Tensor],
    base: Tensor,
    *,
    filter_wise: bool = False,
    found: Products | None = None,
) -> Tensor:
    r"""From the base towards the mean of the models, further the more their changes agree.

        θ = θ_0 + t · (Σ_i θ_i / M − θ_0),   t = M cos / (1 + (M − 1) cos)

    cos is the mean cosine of the angles between the changes, all pairs of models, over the tensor
    or, with `filter_wise`, over each row of a matrix. t = 1 for one model; 0 where the changes
    cancel (1 + (M − 1) cos < 1e-6). A change of 0 has cosine 0 with all.

    Source: Model Stock, 2403.19522, equation 4 for two models and its appendix for more. Relative
    to the paper: t is by tensor as there; rows are an option. It may be below 0. mergekit puts a
    floor of 1e-6 under the product of norms, which shrinks the cosine of small rows.
    """
    models, _ = ordered(tensors)
    base = floating(base)
    change = weighted_sum(models, [1 / len(models)] * len(models), base)
    if filter_wise and base.dim() > 1:
        rows = [(model - base).reshape(base.shape[0], -1).double() for model in models]
        inner = [[(a * b).sum(-1).tolist() for b in rows] for a in rows]
        ts = [
            _stock([[one[row] for one in line] for line in inner]) for row in range(base.shape[0])
        ]
        return base + change * change.new_tensor(ts).reshape(-1, *[1] * (base.dim() - 1))
    return base + _stock(found or change_products([("", tensors, base)])) * change


def _stock(products: Products) -> float:
    """t of `model_stock`."""
    count = len(products)
    if count == 1:
        return 1.0
    cosines = []
    for one in range(count):
        for two in range(one + 1, count):
            norms = math.sqrt(products[one][one]) * math.sqrt(products[two][two])
            cosines.append(products[one][two] / norms if norms else 0.0)
    cosine = math.fsum(cosines) / len(cosines)
    below = 1 + (count - 1) * cosine
    return count * cosine / below if below >= 1e-6 else 0.0


def model_products(whole: Whole) -> Products:
    """⟨θ_i, θ_j⟩ of all pairs of models, over all that is given."""
    return _added(each(whole, lambda _, __, tensors, base: inner_products(tensors)))


def change_products(whole: Whole) -> Products:
    """⟨τ_i, τ_j⟩ of all pairs of models, over all that is given."""
    return _added(each(whole, lambda _, __, tensors, base: inner_products(tensors, base)))


def _added(parts: Iterable[Products]) -> Products:
    total: Products = []
    for part in parts:
        if total:
            pairs = zip(total, part, strict=True)
            part = [[a + b for a, b in zip(one, two, strict=True)] for one, two in pairs]
        total = part
    return total
