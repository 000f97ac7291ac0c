"""Alignment of distributions and fusion functions: laws over the whole dictionary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from fusion.aligned import Aligned
from fusion.functions import (
    FUSION_FUNCTIONS,
    avg_ce,
    avg_ce_reference,
    avg_entropy,
    dual_min_ce,
    entropy,
    log_linear,
    min_ce,
    min_ce_reference,
    min_entropy,
    typed,
)
from fusion.spec import Fuse

ALL = pytest.mark.parametrize("name", FUSION_FUNCTIONS)
# dual_min_ce knows its first source as the target, so that order and copies mean something else.
ALIKE = pytest.mark.parametrize("name", [n for n in FUSION_FUNCTIONS if n != "dual_min_ce"])


def aligned(seed: int, T: int = 4, V: int = 9, K: int = 3) -> Aligned:
    g = np.random.default_rng(seed)
    dense = np.zeros((T, V))
    for t in range(T):
        ids = g.choice(V, K, replace=False)
        p = g.random(K)
        dense[t, ids] = p / p.sum() * g.uniform(0.3, 1)
    covered = g.random(T) > 0.25
    dense[~covered] = 0
    return Aligned(sparse.csr_array(dense), covered)


@ALL
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), M=st.integers(2, 4))
def test_mass_is_at_most_one_and_ids_are_unique(name: str, seed: int, M: int) -> None:
    sources = [aligned(seed + m) for m in range(M)]
    fused = FUSION_FUNCTIONS[name](sources, np.random.default_rng(seed).random(M))
    assert fused.probabilities.sum(axis=1).max() <= 1 + 1e-12
    fused.probabilities.sum_duplicates()
    assert not fused.probabilities[~fused.covered].sum()


@ALIKE
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), M=st.integers(2, 4))
def test_the_order_of_sources_does_not_matter(name: str, seed: int, M: int) -> None:
    g = np.random.default_rng(seed)
    sources, bits = [aligned(seed + m) for m in range(M)], g.permutation(M) + 0.5
    order = g.permutation(M)
    one = FUSION_FUNCTIONS[name](sources, bits)
    two = FUSION_FUNCTIONS[name]([sources[i] for i in order], bits[order])
    assert abs(one.probabilities - two.probabilities).max() < 1e-12
    assert (one.covered == two.covered).all()


@ALIKE
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), M=st.integers(1, 4))
def test_fusing_copies_gives_the_copy(name: str, seed: int, M: int) -> None:
    source = aligned(seed)
    fused = FUSION_FUNCTIONS[name]([source] * M, np.full(M, 0.7))
    assert abs(fused.probabilities - source.probabilities).max() < 1e-12
    assert (fused.covered == source.covered).all()


def test_a_whole_number_reaches_a_function_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(sources: list[Aligned], bits_per_byte: np.ndarray, *, at: int = 0, by: float = 0.0):  # type: ignore[no-untyped-def]
        return sources[at]

    monkeypatch.setitem(FUSION_FUNCTIONS, "first", first)
    section = {"sources": ["a", "b"], "function": "first", "clm_weight": 0.9}
    fuse = Fuse.model_validate(section | {"parameters": {"at": 1, "by": 1}})
    given = typed("first", fuse.parameters)
    assert (given, type(given["at"]), type(given["by"])) == ({"at": 1, "by": 1.0}, int, float)


def test_min_ce_takes_the_best_source_and_the_earlier_one_at_a_tie() -> None:
    one, two = aligned(1), aligned(2)
    assert min_ce([one, two], np.array([2.004, 2.0])) is two
    assert min_ce([one, two], np.array([2.0, 2.004])) is one
    assert min_ce([one, two], np.array([2.0, 2.0])) is one


@given(seed=st.integers(0, 10**6), M=st.integers(2, 4))
def test_the_target_learns_only_from_who_predicts_better(seed: int, M: int) -> None:
    sources = [aligned(seed + m) for m in range(M)]
    bits = np.random.default_rng(seed).permutation(M) + 1.0
    fused = dual_min_ce(sources, bits)
    if bits.argmin() == 0:
        assert not fused.covered.any()
        assert fused.probabilities.sum() == 0
    else:
        best = min_ce(sources[1:], bits[1:])
        assert abs(fused.probabilities - best.probabilities).max() == 0
        assert (fused.covered == best.covered).all()
    assert not dual_min_ce([sources[0]] * 2, np.ones(2)).covered.any()  # a tie teaches nothing


def test_below_the_block_each_position_is_compared_with_the_target() -> None:
    everywhere = np.ones(3, bool)
    own, other = (
        Aligned(sparse.csr_array(np.tile(p, (3, 1))), everywhere) for p in ([1.0, 0], [0, 1.0])
    )
    fused = dual_min_ce([own, other], np.array([[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]]))
    assert fused.covered.tolist() == [True, False, False]
    np.testing.assert_allclose(fused.probabilities.toarray(), [[0, 1.0], [0, 0], [0, 0]])


def dense(source: Aligned) -> np.ndarray:
    """Rows over the vocabulary with each tail spread evenly over the tokens it stands for."""
    p = source.probabilities.toarray()
    missing = (p == 0).sum(axis=1)
    return np.where(p == 0, (source.tail / np.maximum(missing, 1))[:, None], p)


@given(seed=st.integers(0, 10**6), M=st.integers(1, 4))
def test_log_linear_is_the_normalised_geometric_mean(seed: int, M: int) -> None:
    sources = [aligned(seed + m) for m in range(M)]
    fused = log_linear(sources, np.zeros(M))
    for t in np.flatnonzero(fused.covered):
        rows = [np.log(dense(s)[t]) for s in sources if s.covered[t]]
        expected = np.exp(np.mean(rows, axis=0))
        expected /= expected.sum()
        kept = fused.probabilities.toarray()[t]
        np.testing.assert_allclose(kept[kept > 0], expected[kept > 0], rtol=1e-9)
        assert fused.tail[t] == pytest.approx(expected[kept == 0].sum(), abs=1e-12)


def test_a_veto_holds_only_where_a_source_has_a_say() -> None:
    sure = Aligned(sparse.csr_array([[1.0, 0.0], [0.0, 0.0]]), np.array([True, False]))
    open_ = Aligned(sparse.csr_array([[0.5, 0.5], [0.5, 0.5]]), np.array([True, True]))
    fused = log_linear([sure, open_], np.zeros(2)).probabilities.toarray()
    np.testing.assert_allclose(fused, [[1.0, 0.0], [0.5, 0.5]])


@ALIKE
def test_probabilities_that_underflow_to_zero_do_no_harm(name: str) -> None:
    explicit = sparse.csr_array(
        (np.array([1.0, 0.0]), np.array([0, 4]), np.array([0, 2])), shape=(1, 5)
    )
    source = Aligned(explicit, np.array([True]))
    fused = FUSION_FUNCTIONS[name]([source, source], np.zeros(2))
    np.testing.assert_allclose(fused.probabilities.toarray(), [[1.0, 0, 0, 0, 0]])


def test_certainty_decides_position_by_position() -> None:
    sharp = Aligned(sparse.csr_array([[0.9, 0.1], [0.5, 0.5]]), np.array([True, True]))
    blunt = Aligned(sparse.csr_array([[0.5, 0.5], [0.1, 0.9]]), np.array([True, True]))
    best = min_entropy([sharp, blunt], np.zeros(2)).probabilities.toarray()
    np.testing.assert_allclose(best, [[0.9, 0.1], [0.1, 0.9]])
    mixed = avg_entropy([sharp, blunt], np.zeros(2)).probabilities.toarray()
    h = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    weight = np.exp(-h) / (np.exp(-h) + 0.5)  # the other's entropy is ln 2
    np.testing.assert_allclose(mixed[0], weight * np.array([0.9, 0.1]) + (1 - weight) * 0.5)
    np.testing.assert_allclose(entropy(sharp), [h, np.log(2)])


def test_avg_ce_weights_equal_the_recorded_ones(shared: Path) -> None:
    recorded = json.loads((shared / "golden" / "fusion.json").read_text())["avgce_weights"]["cases"]
    for case in recorded:
        count = len(case["ce"])
        sources = [
            Aligned(sparse.csr_array(np.eye(count)[[m]]), np.ones(1, bool)) for m in range(count)
        ]
        fused = avg_ce(sources, np.array(case["ce"]))
        # Each source says its own token with certainty, so the fused row is the weights.
        np.testing.assert_allclose(
            fused.probabilities.toarray()[0], case["weights_paper"], atol=1e-12
        )
        for bfloat16, key in (
            (False, "weights_reference_code"),
            (True, "weights_reference_bfloat16"),
        ):
            fused = avg_ce_reference(sources, np.array(case["ce"]), bfloat16=bfloat16)
            found = fused.probabilities.toarray()[0]
            # Rounded weights do not sum to one; a position's mean is over its weights.
            expected = np.array(case[key])
            np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-12)


def test_min_ce_of_the_published_code_chooses_as_recorded(shared: Path) -> None:
    recorded = json.loads((shared / "golden" / "fusion.json").read_text())["mince_choice"]["cases"]
    for case in recorded:
        sources = [aligned(seed) for seed in range(len(case["ce"]))]
        losses = np.array(case["ce"])
        assert min_ce(sources, losses) is sources[case["index_exact"]]
        assert min_ce_reference(sources, losses) is sources[case["index_reference_bfloat16"]]


def test_below_the_block_every_position_has_its_own_best_source() -> None:
    everywhere = np.ones(3, bool)
    one = Aligned(sparse.csr_array(np.tile([0.8, 0.1], (3, 1))), everywhere)
    two = Aligned(
        sparse.csr_array([[0.2, 0.3], [0.2, 0.3], [0.0, 0.0]]), np.array([True, True, False])
    )
    bits = np.array([[1.0, 2.0, 2.0], [2.0, 1.0, 1.0]])
    best = min_ce([one, two], bits).probabilities.toarray()
    # The better source of the last position does not cover it.
    np.testing.assert_allclose(best, [[0.8, 0.1], [0.2, 0.3], [0.8, 0.1]])
    mean = avg_ce([one, two], bits).probabilities.toarray()
    w = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(mean[0], w * np.array([0.8, 0.1]) + (1 - w) * np.array([0.2, 0.3]))
    np.testing.assert_allclose(mean[2], [0.8, 0.1])
