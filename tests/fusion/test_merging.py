"""Merge methods: laws over the dictionary, values by hand, and recorded results of others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fusion import selection
from fusion.merging import (
    MERGE_METHODS,
    context,
    linear,
    needs_base,
    parameters,
    slerp,
    task_arithmetic,
)

ROOT = Path(__file__).resolve().parents[2]
ALL = pytest.mark.parametrize("method", MERGE_METHODS)
SEEDS = given(seed=st.integers(0, 10**6), count=st.integers(2, 4))
LAWS = settings(deadline=None, max_examples=20)
# Weights add up to one, and nothing is trimmed or left unselected.
WHOLE = {"normalize": True, "density": 1.0, "select_topk": 1.0}


def tensors(seed: int, count: int, shape: tuple[int, ...] = (4, 3)) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(count)]


def whole(method: str) -> dict[str, Any]:
    return {key: value for key, value in WHOLE.items() if key in parameters(method)}


def size(method: str, count: int) -> int:
    return 2 if method == "slerp" else count


@ALL
@LAWS
@SEEDS
def test_copies_merge_to_the_copy(method: str, seed: int, count: int) -> None:
    base, model = tensors(seed, 2)
    copies = [model.clone() for _ in range(size(method, count))]
    found = MERGE_METHODS[method](copies, base, **whole(method))
    torch.testing.assert_close(found, model, atol=1e-6, rtol=1e-5)


@ALL
@LAWS
@SEEDS
def test_bases_merge_to_the_base(method: str, seed: int, count: int) -> None:
    (base,) = tensors(seed, 1)
    found = MERGE_METHODS[method]([base.clone() for _ in range(size(method, count))], base)
    torch.testing.assert_close(found, base, atol=1e-6 if method == "slerp" else 3e-7, rtol=0)
    if needs_base(method) and method != "varm":
        assert torch.equal(found, base)


@pytest.mark.parametrize("method", [m for m in MERGE_METHODS if m != "slerp"])
@LAWS
@SEEDS
def test_the_order_of_models_does_not_change_a_bit(method: str, seed: int, count: int) -> None:
    base, *models = tensors(seed, count + 1, (40, 30))
    allowed = parameters(method)
    weights = [0.3, 0.1, 0.7, 0.2][:count] if "weights" in allowed else None
    lists = "density" in allowed and "list" in str(allowed["density"].annotation)
    density = [0.5, 0.2, 0.9, 0.4][:count] if lists else None

    def merged(order: list[int]) -> Tensor:
        options: dict[str, Any] = {}
        if weights:
            options["weights"] = [weights[i] for i in order]
        if density:
            options["density"] = [density[i] for i in order]
        return MERGE_METHODS[method]([models[i] for i in order], base, **options)

    forward, backward = list(range(count)), list(reversed(range(count)))
    assert torch.equal(merged(forward), merged(backward))
    assert torch.equal(merged(forward), merged([*forward[1:], 0]))


@ALL
def test_threads_do_not_change_a_bit(method: str) -> None:
    base, one, two = tensors(3, 3, (300, 400))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(MERGE_METHODS[method]([one, two], base))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@ALL
def test_inputs_are_left_alone_and_the_result_is_float32(method: str) -> None:
    base, one, two = tensors(1, 3)
    before = [t.clone() for t in (base, one, two)]
    assert MERGE_METHODS[method]([one, two], base).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before, (base, one, two), strict=True))
    half = [t.bfloat16() for t in (base, one, two)]
    assert MERGE_METHODS[method](half[1:], half[0]).dtype == torch.float32
    assert MERGE_METHODS[method]([one[:0], two[:0]], base[:0]).shape == (0, 3)


# Whose weights do not depend on how far each model moved; every other method is under the law.
SAME_WEIGHTS = {
    "linear": "given",
    "slerp": "given",
    "karcher": "given",
    "task_arithmetic": "given",
    "dare_linear": "given",
    "dare_ties": "given",
    "ties@paper": "equal, where the sign agrees",
    "ties@mergekit": "given, where the sign agrees",
    "model_stock": "of the angle alone, one for all models",
    "widen": "of ranks among the columns of the same model",
    "fisher": "of its information",
    "regmean": "of its inputs",
}


@pytest.mark.parametrize("method", [m for m in MERGE_METHODS if m not in SAME_WEIGHTS])
@LAWS
@given(seed=st.integers(0, 10**6), drift=st.floats(0.1, 10))
def test_unequal_drift_gives_unequal_weights(method: str, seed: int, drift: float) -> None:
    """One sign and equal shapes of change, so the weights are 1 : drift² and nothing is erased."""
    base, change = tensors(seed, 2)
    change = change.abs() + 0.1
    one, two = base + change, base + drift * change.flip(0)
    found = MERGE_METHODS[method]([one, two], base, **whole(method))
    heavy = drift**2 / (1 + drift**2)
    expected = base + (1 - heavy) * change + heavy * drift * change.flip(0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@LAWS
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), share=st.floats(0.05, 1))
def test_ties_equals_loops(seed: int, count: int, share: float) -> None:
    base, *models = tensors(seed, count + 1, (3, 5))
    weights = [0.5, 0.3, 0.4, 0.9][:count]
    found = MERGE_METHODS["ties@mergekit"](
        models, base, weights=weights, density=share, scale=0.7
    ).reshape(-1)
    changes = []
    for model in models:
        change = (model - base).reshape(-1).tolist()
        kept = sorted(range(15), key=lambda i: -abs(change[i]))[: max(1, int(share * 15))]  # noqa: B023
        changes.append([c if i in kept else 0.0 for i, c in enumerate(change)])
    for i, start in enumerate(base.reshape(-1).tolist()):
        total = sum(w * c[i] for w, c in zip(weights, changes, strict=True))
        sign = 1 if total >= 0 else -1
        agree = [(w, c[i]) for w, c in zip(weights, changes, strict=True) if c[i] * sign > 0]
        mean = sum(w * c for w, c in agree) / sum(w for w, _ in agree) if agree else 0.0
        assert float(found[i]) == pytest.approx(start + 0.7 * mean, abs=1e-5)


def test_known_values() -> None:
    base, one, two = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert linear([one, two], None, weights=[1, 0]).tolist() == [1, 0]
    assert linear([one, two], None, weights=[1, 3]).tolist() == [0.25, 0.75]
    half = 2**-0.5
    torch.testing.assert_close(slerp([one, two], None, t=0.5), torch.tensor([half, half]))
    assert slerp([one, two], None, t=0.0).tolist() == [1, 0]
    assert slerp([one, two], None, t=1.0).tolist() == [0, 1]
    assert task_arithmetic([one, two], base, scale=0.5).tolist() == [0.5, 0.5]
    assert task_arithmetic([one], base).tolist() == [1, 0]
    # A model that moved twice as far weighs four times as much.
    varm = MERGE_METHODS["varm"]
    torch.testing.assert_close(varm([one, 2 * two], base), torch.tensor([0.2, 1.6]))
    assert varm([base, one], base).tolist() == [1, 0]


def test_of_equal_changes_the_first_are_kept() -> None:
    ties = MERGE_METHODS["ties@mergekit"]
    one = torch.tensor([1.0, -2.0, 2.0, 2.0, 0.0])
    assert ties([one], torch.zeros(5), density=0.4).tolist() == [0, -2, 2, 0, 0]
    assert ties([one], torch.zeros(5), density=0.01).tolist() == [0, -2, 0, 0, 0]


def test_the_three_sces_differ_where_they_say() -> None:
    base = torch.zeros(4)
    one, two = torch.tensor([2.0, 1.0, 0.0, 0.1]), torch.tensor([-1.0, 1.0, 0.0, 0.3])
    # Half of the two elements that vary is the first. There w = 4/5 and 1/5, and + is elected.
    found = {
        m: MERGE_METHODS[m]([one, two], base, select_topk=0.5) for m in MERGE_METHODS if "sce" in m
    }
    torch.testing.assert_close(found["sce@paper"], torch.tensor([1.6, 0, 0, 0]))
    assert torch.equal(found["sce"], found["sce@paper"])
    torch.testing.assert_close(found["sce@mergekit"], torch.tensor([2.0, 0, 0, 0]))
    torch.testing.assert_close(found["sce@fusechat"], torch.tensor([2.0, 1.0, 0, 0.14]))
    # Copies do not vary: the paper's method keeps them, mergekit goes back to the base.
    assert torch.equal(MERGE_METHODS["sce"]([one, one], base), one)
    assert torch.equal(MERGE_METHODS["sce@mergekit"]([one, one], base, select_topk=0.5), base)


def test_mergekits_sce_forgets_small_changes() -> None:
    base, one, two = torch.zeros(2), torch.tensor([1e-4, 0]), torch.tensor([3e-4, 0])
    merge = {name: MERGE_METHODS[f"sce@{name}"] for name in ("mergekit", "fusechat")}
    assert float(merge["mergekit"]([one, two], base)[0]) == pytest.approx(2e-4, rel=1e-4)
    found = merge["fusechat"]([one, two], base, select_topk=1.0)
    assert float(found[0]) == pytest.approx(0.1 * 1e-4 + 0.9 * 3e-4, rel=1e-4)


def test_wrong_arguments_are_refused() -> None:
    one, two, three = tensors(2, 3)
    with pytest.raises(ValueError, match="two models"):
        slerp([one, two, three], None)
    with pytest.raises(ValueError, match="t is 2"):
        slerp([one, two], None, t=2)
    with pytest.raises(ValueError, match="2 weights for 3 models"):
        linear([one, two, three], None, weights=[1, 2])
    with pytest.raises(ValueError, match="add up to nothing"):
        linear([one, two], None, weights=[1, -1])
    with pytest.raises(ValueError, match="density is 0"):
        MERGE_METHODS["ties@mergekit"]([one, two], three, density=0)
    with pytest.raises(ValueError, match="1 densities for 2 models"):
        MERGE_METHODS["ties@mergekit"]([one, two], three, density=[0.5])
    with pytest.raises(ValueError, match="select_topk is 10"):
        MERGE_METHODS["sce"]([one, two], three, select_topk=10)
    with pytest.raises(ValueError, match="no model"):
        linear([], None)


def test_what_a_recipe_may_set_is_the_signature() -> None:
    assert list(parameters("ties@mergekit")) == ["weights", "density", "scale", "normalize"]
    assert list(parameters("varm")) == ["granularity"]
    assert list(parameters("dare_ties"))[-2:] == ["rescale", "seed"]
    assert parameters("sce")["select_topk"].default == 0.1
    without = [method for method in MERGE_METHODS if not needs_base(method)]
    assert without == ["linear", "slerp", "karcher", "fisher", "regmean"]


def test_signatures_are_there_without_torch() -> None:
    code = "import sys, fusion.merging; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def recorded(
    shared: Path,
    file: str,
    merge: Callable[[str, list[Tensor], Tensor], Tensor],
    dtype: torch.dtype,
    without: Sequence[str] = (),
) -> float:
    """Largest difference from a recorded file, over all its tensors but those named."""
    golden = shared / "golden" / "merge"
    models = {n: load_file(golden / "models" / n / "model.safetensors") for n in ("base", *"abc")}
    models = {n: {k: v.to(dtype) for k, v in m.items()} for n, m in models.items()}
    expected = load_file(golden / f"{file}.safetensors")
    assert len(expected) == 21
    return max(
        float((merge(k, [models[n][k] for n in "abc"], models["base"][k]).double() - v).abs().max())
        for k, v in expected.items()
        if k not in without
    )


EXACT = [
    ("sce@fusechat", "sce_b_0.1", 0.1),
    ("sce@fusechat", "sce_b_0.5", 0.5),
    ("sce@fusechat", "sce_a_1.0", 1.0),
    ("sce@paper", "sce_paper_0.5", 0.5),
    ("varm", "varm_matrix", None),
    ("widen", "widen", None),
]


@pytest.mark.parametrize(("method", "file", "share"), EXACT)
def test_formulas_in_float64(shared: Path, method: str, file: str, share: float | None) -> None:
    options = {} if share is None else {"select_topk": share}

    def merge(name: str, models: list[Tensor], base: Tensor) -> Tensor:
        named = {"name": name} if "name" in context(method) else {}
        return MERGE_METHODS[method](models, base, **options, **named)

    assert recorded(shared, f"exact/{file}", merge, torch.float64) < 1e-12
    assert recorded(shared, f"exact/{file}", merge, torch.float32) < 3e-7


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_mergekits_sce_is_the_formula_but_for_its_threshold(
    shared: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    def merge(_: str, models: list[Tensor], base: Tensor) -> Tensor:
        return MERGE_METHODS["sce@mergekit"](models, base, select_topk=share)

    exact = f"exact/sce_a_{share}"
    assert recorded(shared, exact, merge, torch.float64) > 1e-6
    monkeypatch.setattr(selection, "_NO_MASS", 1e-30)
    assert recorded(shared, exact, merge, torch.float64) < 1e-12


MERGEKIT = [
    ("linear", "linear", {"weights": [0.5, 0.3, 0.4]}),
    ("task_arithmetic", "task_arithmetic", {"weights": [0.5, 0.3, 0.4]}),
    (
        "task_arithmetic",
        "task_arithmetic_normalized",
        {"weights": [0.25, 0.5, 0.5], "scale": 0.7, "normalize": True},
    ),
    ("ties@mergekit", "ties", {"density": 0.5}),
    (
        "ties@mergekit",
        "ties_unnormalized",
        {"weights": [0.2] * 3, "density": 0.6, "normalize": False},
    ),
    (
        "ties@mergekit",
        "ties_weighted",
        {"weights": [0.5, 0.3, 0.4], "density": [0.2, 0.5, 0.8], "scale": 1.2},
    ),
    ("sce@mergekit", "sce_0.1", {"select_topk": 0.1}),
    ("sce@mergekit", "sce_0.5", {"select_topk": 0.5}),
    ("sce@mergekit", "sce_1.0", {}),
    ("model_stock", "model_stock", {}),
]


@pytest.mark.parametrize(("method", "file", "options"), MERGEKIT)
def test_mergekits_outputs(shared: Path, method: str, file: str, options: dict) -> None:
    def merge(_: str, models: list[Tensor], base: Tensor) -> Tensor:
        return MERGE_METHODS[method](models, base, **options)

    assert recorded(shared, f"mergekit/{file}", merge, torch.float32) < 3e-7


def test_mergekits_slerp_and_its_gradient_over_layers(shared: Path) -> None:
    def one_t(_: str, models: list[Tensor], base: Tensor) -> Tensor:
        return slerp(models[:2], None, t=0.3)

    def by_layer(name: str, models: list[Tensor], base: Tensor) -> Tensor:
        last = ".layers.1." in name
        t = float(last) if "self_attn" in name else float(not last) if "mlp" in name else 0.5
        return slerp(models[:2], None, t=t)

    assert recorded(shared, "mergekit/slerp", one_t, torch.float32) < 3e-7
    assert recorded(shared, "mergekit/slerp_gradient", by_layer, torch.float32) < 3e-7
