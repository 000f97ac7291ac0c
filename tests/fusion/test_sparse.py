"""TIES over a whole model and DARE: recorded outputs, draws that depend on nothing else."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fusion import loops, sparse
from fusion.sparse import dare_linear, dare_ties, ties_paper, trim
from fusion.tensors import ordering

LAWS = settings(deadline=None, max_examples=20)
Models = dict[str, dict[str, Tensor]]


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden" / "merge"


@pytest.fixture
def models(golden: Path) -> Models:
    names = ("base", "a", "b", "c")
    return {n: load_file(golden / "models" / n / "model.safetensors") for n in names}


def whole(models: Models, dtype: torch.dtype) -> list[tuple[str, list[Tensor], Tensor]]:
    return [
        (name, [models[m][name].to(dtype) for m in ("a", "b", "c")], base.to(dtype))
        for name, base in sorted(models["base"].items())
    ]


@pytest.mark.parametrize(("density", "dtype"), [
    (0.2, torch.float64), (0.5, torch.float64), (0.5, torch.float32),
])  # fmt: skip
def test_ties_over_the_whole_model_is_the_recorded_formula(
    golden: Path, models: Models, density: float, dtype: torch.dtype
) -> None:
    parts = whole(models, dtype)
    found = trim(parts, density=density)
    assert not found.positive  # as recorded: ties of the election go to minus here
    expected = load_file(golden / "exact" / f"ties_global_{density}.safetensors")
    for name, tensors, base in parts:
        merged = ties_paper(tensors, base, density=density, found=found)
        limit = 1e-12 if dtype == torch.float64 else 3e-7
        torch.testing.assert_close(merged.double(), expected[name], atol=limit, rtol=0)
        by_itself = ties_paper(tensors, base, density=density)
        assert by_itself.shape == base.shape


def test_the_authors_code_keeps_one_element_more(golden: Path, models: Models) -> None:
    """Each recorded replacement is an element just below our threshold."""
    parts = whole(models, torch.float64)
    least = trim(parts, density=0.5).thresholds
    recorded = json.loads((golden / "exact" / "ties_global_authors_0.5.json").read_text())
    for one in recorded["replace"]:
        changes = [
            abs(float((m - b).reshape(-1)[one["flat_index"]]))
            for name, ms, b in parts
            if name == one["tensor"]
            for m in ms
        ]
        below = [t - c for c, t in zip(changes, least, strict=True) if 0 < t - c < 1e-5]
        assert below, one


@LAWS
@given(seed=st.integers(0, 10**6), density=st.floats(0.01, 1), double=st.booleans())
def test_trim_equals_sorting_everything(seed: int, density: float, double: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    sizes = (1, 7, 30)
    bases = [torch.randn(n, generator=g, dtype=dtype) for n in sizes]
    pairs = [[b + torch.randn(n, generator=g, dtype=dtype) for _ in range(2)]
             for n, b in zip(sizes, bases, strict=True)]  # fmt: skip
    found = trim([(str(n), p, b) for n, p, b in zip(sizes, pairs, bases, strict=True)],
                 density=density)  # fmt: skip
    keep = max(1, int(density * sum(sizes)))
    for model, least in enumerate(found.thresholds):
        changes = sorted(
            (abs(x) for p, b in zip(pairs, bases, strict=True) for x in (p[model] - b).tolist()),
            reverse=True,
        )
        assert least == changes[keep - 1]


def test_an_undecided_sign_follows_the_whole_model() -> None:
    base = torch.zeros(3)
    one, two = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([-1.0, 3.0, 2.0])
    assert ties_paper([one, two], base, density=1.0).tolist() == [1, 3, 2]
    assert ties_paper([-one, -two], base, density=1.0).tolist() == [-1, -3, -2]
    # A tensor that hardly moved keeps nothing beside one that moved much.
    small = (torch.full((3,), 1e-3), torch.zeros(3))
    found = trim([("much", [one], base), ("little", [small[0]], small[1])], density=0.5)
    assert ties_paper([small[0]], small[1], found=found).tolist() == [0, 0, 0]


RESCALED = [
    ("exact/dare_linear_paper_rescale", dare_linear, {}),
    ("mergekit/dare_linear", dare_linear, {"rescale": "norm@mergekit"}),
    ("mergekit/dare_linear_no_rescale", dare_linear, {"rescale": "none"}),
    ("mergekit/dare_ties", dare_ties, {"rescale": "norm@mergekit"}),
]


@pytest.mark.parametrize(("file", "method", "options"), RESCALED)
def test_dare_with_recorded_masks(
    golden: Path,
    models: Models,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    method: Any,
    options: dict[str, Any],
) -> None:
    masks = load_file(golden / "masks" / "dare.safetensors")

    names = sorted({key.rpartition(".")[0] for key in masks})

    def keyed(draw: Any, model: str) -> tuple[int, int]:
        return ord(model[0]), names.index(draw.name)

    def recorded(
        out: np.ndarray, models: Any, ground: Any, rank: None, leasts: Any, rooms: Any, draws: Any,
        *given: Any,
    ) -> None:  # fmt: skip
        """What the masks drop is as in the base; what is left is kept, whatever is drawn."""
        first, bounds, keys, streams, factors = draws
        which = [f"{names[n]}.{chr(key)}" for key, n in zip(keys, streams, strict=True)]
        kept = [masks[name].bool().numpy().reshape(-1) for name in which]
        models = tuple(np.where(m, model, ground) for m, model in zip(kept, models, strict=True))
        every = (first, np.full_like(bounds, 2**32 - 1), keys, streams, factors)
        combine(out, models, ground, rank, leasts, rooms, every, *given)

    combine = loops.combine
    monkeypatch.setattr(sparse, "_keyed", keyed)
    monkeypatch.setattr(loops, "combine", recorded)
    exact = file.startswith("exact")
    expected = load_file(golden / f"{file}.safetensors")
    for name, tensors, base in whole(models, torch.float64 if exact else torch.float32):
        found = method(
            tensors, base, weights=[0.5, 0.3, 0.4], density=0.5, name=name, models="abc", **options
        )
        limit = 1e-12 if exact else 3e-7
        torch.testing.assert_close(found, expected[name], atol=limit, rtol=0)


def drawn(count: int, density: float, model: str, seed: int, name: str, start: int) -> np.ndarray:
    ones, of = torch.ones(count), {"seed": seed, "name": name, "start": start, "models": [model]}
    found = dare_linear([ones], 0 * ones, density=density, rescale="none", **of)
    return found.numpy() > 0


def test_draws_depend_on_seed_model_tensor_and_place_alone() -> None:
    mask = drawn(10_000, 0.3, "a", 1, "x", 0)
    assert abs(mask.mean() - 0.3) < 5 * (0.3 * 0.7 / 10_000) ** 0.5
    for other in (
        drawn(10_000, 0.3, "b", 1, "x", 0),
        drawn(10_000, 0.3, "a", 2, "x", 0),
        drawn(10_000, 0.3, "a", 1, "y", 0),
    ):
        assert 0.38 < (mask ^ other).mean() < 0.46
    for cuts in ([0, 100, 5000, 10_000], range(0, 10_001, 4), [0, 1028, 9_996, 10_000]):
        rows = [drawn(b - a, 0.3, "a", 1, "x", a) for a, b in pairwise(cuts)]
        assert np.array_equal(np.concatenate(rows), mask)
    more = drawn(10_000, 0.6, "a", 1, "x", 0)
    assert not (mask & ~more).any()


def test_draws_stay_what_they_are() -> None:
    """Another library or version must not silently give other models."""
    mask = drawn(16, 0.5, "a", 7, "lm_head.weight", 0)
    assert "".join(str(int(x)) for x in mask) == "0010001000010110"


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_dare_is_unbiased_over_seeds(method: Any) -> None:
    base, model = torch.zeros(400), torch.linspace(0.5, 1.5, 400)
    seeds = 200
    found = sum(method([model], base, density=0.25, seed=seed) for seed in range(seeds)) / seeds
    # The standard error of an element is τ · sqrt((1 − d) / d / seeds) = 0.12 τ.
    assert float(((found - model) / model).abs().max()) < 5 * 0.1225
    assert float((found / model).mean()) == pytest.approx(1, abs=4 * 0.1225 / 20)


def test_copies_have_draws_of_their_own() -> None:
    base, model = torch.zeros(1000), torch.ones(1000)
    found = dare_linear([model, model], base, density=0.5, models=["same", "same"])
    assert {0.0, 2.0, 4.0} == set(found.tolist())
    order, _ = ordering([model, base])
    assert order == [1, 0]


def test_wrong_arguments_of_dare_are_refused() -> None:
    base, model = torch.zeros(2), torch.ones(2)
    with pytest.raises(ValueError, match="rescale is 'l1'"):
        dare_linear([model], base, rescale="l1")
    with pytest.raises(ValueError, match="density is 0"):
        dare_ties([model], base, density=0)
    with pytest.raises(ValueError, match="2 densities for 1 models"):
        dare_linear([model], base, density=[0.1, 0.2])
    with pytest.raises(ValueError, match="density is 1.5"):
        ties_paper([model], base, density=1.5)
