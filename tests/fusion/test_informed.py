"""Merges by statistics: formulas by hand, the least-squares solution, and their laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion.informed import fisher, regmean
from fusion.means import linear

SEEDS = given(seed=st.integers(0, 10**6), count=st.integers(2, 4))
LAWS = settings(deadline=None, max_examples=20)
DOUBLE = torch.float64


def drawn(seed: int, count: int, shape: tuple[int, ...] = (4, 3)) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=DOUBLE) for _ in range(count)]


def grams(seed: int, count: int, rows: int = 9, width: int = 3) -> list[Tensor]:
    return [x.T @ x for x in drawn(seed, count, (rows, width))]


@LAWS
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), floor=st.floats(1e-6, 0.5))
def test_fisher_equals_loops(seed: int, count: int, floor: float) -> None:
    models = drawn(seed, count)
    information = [f**4 for f in drawn(seed + 1, count)]
    weights = [0.5, 2.0, 0.0, 1.25][:count]
    found = fisher(models, None, weights=weights, floor=floor, statistics=information)
    for at in range(12):
        above = below = 0.0
        for model, f, weight in zip(models, information, weights, strict=True):
            share = weight * max(float(f.reshape(-1)[at]), floor)
            above += share * float(model.reshape(-1)[at])
            below += share
        assert float(found.reshape(-1)[at]) == pytest.approx(above / below, rel=1e-12, abs=1e-14)


def test_fisher_of_known_values() -> None:
    one, two = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([3.0, 3.0, 3.0, 3.0])
    information = [torch.tensor([1.0, 3.0, 1e30, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])]
    # Equal, three to one, as good as infinite, and reached by no text.
    found = fisher([one, two], None, statistics=information)
    assert found.tolist() == [2.0, 1.5, 1.0, 2.0]
    # Where one model's text never came, the other decides, but for the floor.
    found = fisher([one, two], None, floor=1 / 3, statistics=[0 * one, one])
    assert found.tolist() == [2.5] * 4


def test_regmean_is_the_least_squares_solution_over_all_models_data() -> None:
    inputs, models = drawn(5, 3, (40, 6)), drawn(6, 3, (4, 6))
    products = [x.T @ x for x in inputs]
    found = regmean(models, None, scaling=1.0, statistics=products)
    outputs = torch.cat([x @ w.T for x, w in zip(inputs, models, strict=True)])
    best = torch.linalg.lstsq(torch.cat(inputs), outputs).solution.T
    torch.testing.assert_close(found, best, rtol=1e-10, atol=1e-12)
    scaled = regmean(models, None, statistics=products)  # 0.9 is another solution
    assert float((scaled - best).abs().max()) > 1e-3


def test_regmean_equals_its_formula() -> None:
    models, products = drawn(1, 3, (5, 3)), grams(2, 3)
    for scaling in (0.0, 0.5, 0.9):
        scaled = [
            torch.stack(
                [g[i] * (scaling + (1 - scaling) * torch.eye(3, dtype=DOUBLE)[i]) for i in range(3)]
            )
            for g in products
        ]
        above = sum(g @ w.T for g, w in zip(scaled, models, strict=True))
        expected = (torch.linalg.inv(sum(scaled)) @ above).T
        found = regmean(models, None, scaling=scaling, statistics=products)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_what_never_occurred_takes_the_mean() -> None:
    one, two = drawn(3, 2, (2, 3))
    x, y = drawn(4, 2, (9, 3))
    x[:, 2] = y[:, 2] = 0
    for scaling in (0.9, 1.0):
        found = regmean([one, two], None, scaling=scaling, statistics=[x.T @ x, y.T @ y])
        torch.testing.assert_close(found[:, 2], (one + two)[:, 2] / 2)
        assert not torch.allclose(found[:, 0], (one + two)[:, 0] / 2)
    # Fewer rows than inputs: across them the solution, elsewhere the mean.
    x = drawn(4, 1, (2, 3))[0]
    found = regmean([one, two], None, scaling=1.0, statistics=[x.T @ x, 3 * x.T @ x])
    torch.testing.assert_close(x @ found.T, x @ (one + 3 * two).T / 4)
    across = torch.linalg.svd(x).Vh[2]
    torch.testing.assert_close(found @ across, (one + two) @ across / 2)


@LAWS
@SEEDS
def test_copies_merge_to_the_copy_whatever_the_statistics(seed: int, count: int) -> None:
    model = drawn(seed, 1)[0].float()
    copies = [model.clone() for _ in range(count)]
    information = [f.square().float() for f in drawn(seed + 1, count)]
    assert torch.equal(fisher(copies, None, statistics=information), model)
    for scaling in (0.9, 1.0):
        products = [g.float() for g in grams(seed, count)]
        assert torch.equal(regmean(copies, None, scaling=scaling, statistics=products), model)


@LAWS
@SEEDS
def test_equal_statistics_give_the_mean(seed: int, count: int) -> None:
    models = drawn(seed, count)
    mean = linear(models, None)
    same = [drawn(seed + 1, 1)[0].square()] * count
    torch.testing.assert_close(fisher(models, None, statistics=same), mean)
    torch.testing.assert_close(regmean(models, None, statistics=grams(seed, 1) * count), mean)
    scaled = [2.0 * torch.eye(3, dtype=DOUBLE)] * count
    torch.testing.assert_close(regmean(models, None, statistics=scaled), mean)


@LAWS
@SEEDS
def test_order_and_threads_do_not_change_a_bit(seed: int, count: int) -> None:
    models = [m.float() for m in drawn(seed, count, (30, 40))]
    models[-1] = models[0].clone()  # two models that only their statistics tell apart
    information = [f.square().float() for f in drawn(seed + 1, count, (30, 40))]
    products = [g.float() for g in grams(seed, count, 50, 40)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads, order in ((1, list(range(count))), (2, list(range(count))[::-1])):
            torch.set_num_threads(threads)
            ordered = [models[i] for i in order]
            weights = [[0.3, 0.1, 0.7, 0.2][i] for i in order]
            one = [information[i] for i in order]
            two = [products[i] for i in order]
            found.append(
                (
                    fisher(ordered, None, weights=weights, statistics=one),
                    regmean(ordered, None, statistics=two),
                )
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_wrong_parameters_are_refused() -> None:
    models = drawn(1, 2)
    for wrong, message in (
        ({"floor": 0.0}, "floor is 0"),
        ({"labels": "both"}, "should be data or model"),
        ({"weights": [1, -1]}, "at least 0"),
        ({"weights": [0, 0]}, "one above"),
    ):
        with pytest.raises(ValueError, match=message):
            fisher(models, None, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scaling is 2"):
        regmean(models, None, scaling=2)
