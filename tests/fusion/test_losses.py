"""The chunked loss against dense arithmetic in float64 and against recorded values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch.utils._python_dispatch import TorchDispatchMode

from fusion import losses
from fusion.aligned import Aligned
from fusion.functions import _filled, avg_ce, avg_ce_reference, min_ce_reference
from fusion.losses import IGNORED, OBJECTIVES, Chunks, Targets, alm, fused_loss, gold_logprobs


def example(seed: int, T: int, V: int, K: int, D: int = 5) -> tuple:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g, dtype=torch.float64)
    head = torch.randn(V, D, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, (T,), generator=g)
    labels[0] = IGNORED
    p = torch.rand(T, V, generator=g, dtype=torch.float64)
    ids = torch.stack([torch.randperm(V, generator=g)[:K] for _ in range(T)])
    kept = torch.rand(T, K, generator=g, dtype=torch.float64)
    kept = kept / kept.sum(-1, keepdim=True) * torch.rand(T, 1, generator=g).double() * 0.98
    weights = (torch.rand(T, generator=g) > 0.3).double() / T
    assert p.shape == (T, V)
    return hidden, head, labels, Targets(ids, kept, weights)


def dense(hidden, head, labels, targets, clm_weight, softcap=None):  # noqa: ANN001, ANN201
    """The same loss, token by token in Python, with the tail spread over explicit tokens."""
    z = hidden @ head.T
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    q = torch.log_softmax(z, -1)
    valid = [t for t in range(len(labels)) if labels[t] != IGNORED]
    clm = sum(-q[t, labels[t]] for t in valid) / len(valid)
    fusion = torch.zeros((), dtype=torch.float64)
    for t in range(len(labels)):
        kept = {
            int(i): float(p) for i, p in zip(targets.ids[t], targets.probabilities[t], strict=True)
        }
        rest = [v for v in range(z.shape[1]) if v not in kept]
        tail = 1 - sum(kept.values())
        kl = sum(p * (math.log(p) - q[t, v]) for v, p in kept.items() if p > 0)
        if rest:
            kl = kl + tail * (math.log(tail) - torch.logsumexp(q[t, rest], 0))
        fusion = fusion + targets.weights[t] * kl
    return clm_weight * clm + (1 - clm_weight) * fusion, clm, fusion


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    T=st.integers(1, 7),
    V=st.integers(4, 12),
    K=st.integers(1, 3),
    clm_weight=st.sampled_from([0.0, 0.5, 0.9]),
    softcap=st.sampled_from([None, 3.0]),
)
def test_values_and_gradients_are_those_of_a_dense_softmax(
    seed: int, T: int, V: int, K: int, clm_weight: float, softcap: float | None
) -> None:
    hidden, head, labels, targets = example(seed, T, V, K)
    if (labels == IGNORED).all():
        return
    one, two = (x.clone().requires_grad_() for x in (hidden, head))
    expected, clm, fusion = dense(one, two, labels, targets, clm_weight, softcap)
    expected.backward()
    three, four = (x.float().clone().requires_grad_() for x in (hidden, head))
    sparse = Targets(targets.ids, targets.probabilities.float(), targets.weights.float())
    loss = fused_loss(three, four, labels, sparse, clm_weight, softcap=softcap)
    loss.total.backward()
    # float32 against float64; values are of order ten.
    assert loss.total.item() == pytest.approx(expected.item(), abs=2e-4)
    assert loss.clm.item() == pytest.approx(clm.item(), abs=2e-4)
    assert loss.fusion.item() == pytest.approx(fusion.item(), abs=2e-4)
    torch.testing.assert_close(three.grad.double(), one.grad, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(four.grad.double(), two.grad, atol=2e-4, rtol=1e-3)


def in_float32(targets: Targets) -> Targets:
    return Targets(targets.ids, targets.probabilities.float(), targets.weights.float())


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels, targets = example(3, 11, 9, 2)
    arguments = (hidden.float(), head.float(), labels, in_float32(targets), 0.5)
    whole = fused_loss(*arguments).total
    monkeypatch.setattr(losses, "CHUNK", 3)
    assert fused_loss(*arguments).total.item() == pytest.approx(whole.item(), rel=1e-6)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        sizes = [x.numel() for x in made if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("kind", ["kl", "jsd", "alm"])
def test_logits_of_the_whole_sequence_never_exist(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 4)
    hidden, head, labels, targets = example(3, 64, 50, 2)
    given: Targets | Chunks = targets
    if kind == "alm":
        index = torch.arange(64)[:, None] // 3
        given = Chunks(index, -torch.ones(22).double(), torch.full((22,), 1 / 22).double())
    hidden.requires_grad_()
    head.requires_grad_()
    with Largest() as seen:
        objective = "kl" if kind == "alm" else kind
        fused_loss(hidden, head, labels, given, 0.5, objective=objective).total.backward()
    assert seen.elements <= max(4 * 50, 64 * 5, 50 * 5)


def test_a_head_with_more_rows_than_the_tokenizer_has_tokens() -> None:
    hidden, head, labels, targets = example(4, 8, 12, 3)
    labels = labels.clamp_max(8)
    g = torch.Generator().manual_seed(4)
    ids = torch.stack([torch.randperm(9, generator=g)[:3] for _ in range(8)])
    h = hidden.clone().requires_grad_()
    w = head.clone().requires_grad_()
    padded = Targets(ids, targets.probabilities, targets.weights)
    fused_loss(h, w, labels, padded, 0.5).total.backward()
    expected, two = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    dense(expected, two, labels, padded, 0.5)[0].backward()
    torch.testing.assert_close(h.grad, expected.grad, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(w.grad, two.grad, atol=1e-10, rtol=1e-8)


def test_lambda_one_is_exactly_cross_entropy() -> None:
    hidden, head, labels, targets = example(5, 8, 10, 3)
    loss = fused_loss(hidden.float(), head.float(), labels, targets, 1.0)
    logits = hidden.float() @ head.float().T
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_positions_without_weight_do_not_move_the_loss() -> None:
    hidden, head, labels, targets = example(7, 8, 10, 3)
    silent = torch.zeros_like(targets.weights)
    silent[2] = 1.0
    arguments = (hidden.float(), head.float(), labels)
    one = in_float32(Targets(targets.ids, targets.probabilities, silent))
    moved = targets.ids.clone()
    moved[5] = (moved[5] + 1) % 10
    two = in_float32(Targets(moved, targets.probabilities, silent))
    assert fused_loss(*arguments, one, 0.0).total == fused_loss(*arguments, two, 0.0).total


def test_padding_may_stand_anywhere_behind_the_kept_entries() -> None:
    hidden, head, labels, targets = example(9, 6, 10, 3)
    wide = Targets(
        torch.cat([targets.ids, torch.full((6, 4), -1)], 1),
        torch.cat([targets.probabilities, torch.zeros(6, 4)], 1),
        targets.weights,
    )
    grads = []
    for given_targets in (targets, wide):
        h = hidden.float().requires_grad_()
        fused_loss(h, head.float(), labels, in_float32(given_targets), 0.3).total.backward()
        grads.append(h.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-7, rtol=1e-6)


def recorded(shared: Path, block: str) -> list[dict]:
    return json.loads((shared / "golden" / "fusion.json").read_text())[block]["cases"]


def rows_against(case: dict, p: list[list[float]], ids: list, key: str, weight: float) -> None:
    """Loss and gradient of each row in float64, through an identity for the head."""
    logits = torch.tensor(case["student_logits"], dtype=torch.float64)
    for row in range(len(logits)):
        hidden = logits[row : row + 1].clone().requires_grad_()
        targets = Targets(
            torch.tensor([ids[row]]),
            torch.tensor([p[row]], dtype=torch.float64),
            torch.ones(1, dtype=torch.float64),
        )
        head = torch.eye(logits.shape[1], dtype=torch.float64)
        loss = fused_loss(hidden, head, torch.zeros(1).long(), targets, 0.0)
        loss.total.backward()
        losses_, grads = (
            (case["loss"][key], case["grad"][key])
            if "loss" in case
            else (case[f"loss_{key}"], case[f"grad_{key}"])
        )
        assert loss.fusion.item() == pytest.approx(losses_[row], rel=1e-12, abs=weight)
        expected = torch.tensor(grads[row], dtype=torch.float64)
        torch.testing.assert_close(hidden.grad[0], expected, atol=weight, rtol=1e-12)


def test_sparse_rows_equal_the_recorded_float64_values(shared: Path) -> None:
    for case in recorded(shared, "sparse_kl"):
        # Beyond rounding of the 1 − Σ p that the recorded tail was not made from.
        rows_against(case, case["p"], case["ids"], "tail_bucket", 2e-12)
        scaled = [[x / sum(row) for x in row] for row in case["p"]]
        rows_against(case, scaled, case["ids"], "renormalised", 2e-12)


def test_fused_sparse_rows_equal_the_recorded_ones(shared: Path) -> None:
    for case in recorded(shared, "fuse_sparse"):
        width = len(case["student_logits"][0])
        everywhere = np.ones(len(case["student_logits"]), bool)
        sources = []
        for source in case["sources"]:
            p = np.zeros((len(everywhere), width))
            np.put_along_axis(p, np.array(source["ids"]), np.array(source["p"]), axis=1)
            sources.append(Aligned(sparse.csr_array(p), everywhere))
        fused = avg_ce(sources, np.array(case["ce"])).probabilities
        fused.sort_indices()
        cut = [slice(*fused.indptr[t : t + 2]) for t in range(len(everywhere))]
        assert [fused.indices[c].tolist() for c in cut] == case["fused_ids"]
        for c, p in zip(cut, case["fused_p"], strict=True):
            np.testing.assert_allclose(fused.data[c], p, atol=1e-12)
        kept = [fused.data[c].tolist() for c in cut]
        rows_against(case, kept, case["fused_ids"], "tail_bucket", 2e-12)


def fused_rows(case: dict, sequence: dict) -> Aligned:
    """What the published code makes of one recorded sequence's sources, by our functions."""
    sources = []
    for teacher in sequence["teachers"]:
        p = np.zeros((sequence["max_length"], sequence["vocab"]))
        for t, (ids, logits) in enumerate(zip(teacher["indices"], teacher["logits"], strict=True)):
            if ids:
                softened = np.array(logits) / sequence["temperature"]
                weights = np.exp(softened - softened.max())
                p[t, ids] = weights / weights.sum()
        p[sequence["length"] :, sequence["pad_id"]] = 1.0
        sources.append(Aligned(sparse.csr_array(p), np.ones(len(p), bool)))
    losses_ = np.array([teacher["ce"] for teacher in sequence["teachers"]])
    base = "base" in case["results"][0]["candidates"]
    if case["weights"] == "paper":
        return avg_ce(_filled(sources), losses_)
    if case["rule"] == "avgce":
        return avg_ce_reference(sources, losses_, base_is_candidate=base, bfloat16=False)
    two = len(case["results"][0]["candidates"]) == 2 and base
    return min_ce_reference(
        sources[:2] if two else sources, losses_[:2] if two else losses_, base_is_candidate=base
    )


def test_whole_steps_equal_the_published_codes(shared: Path) -> None:
    for case in recorded(shared, "steps"):
        sequences = case["sequences"]
        width = sequences[0]["vocab"]
        for sequence, result in zip(sequences, case["results"], strict=True):
            p = fused_rows(case, sequence).probabilities.toarray()
            np.testing.assert_allclose(p, result["target"], atol=1e-12, err_msg=case["name"])
        logits = torch.tensor([s["student_logits"] for s in sequences], dtype=torch.float64)
        hidden = logits.flatten(0, 1).requires_grad_()
        labels = torch.tensor([[*s["labels"][1:], IGNORED] for s in sequences]).flatten()
        mask = torch.tensor([r["mask"] for r in case["results"]], dtype=torch.float64).flatten()
        p = torch.tensor([r["target"] for r in case["results"]], dtype=torch.float64)
        p = p.flatten(0, 1)
        ids = torch.arange(width).expand(len(p), width)
        targets = Targets(ids, p, mask / mask.sum())
        head = torch.eye(width, dtype=torch.float64)
        loss = fused_loss(hidden, head, labels, targets, case["lambda_effective"])
        loss.total.backward()
        entropy = -torch.xlogy(p, p).sum(-1) @ targets.weights
        offset = entropy if case["loss_type"] == "ce" else 0.0  # same gradient
        fusion = loss.fusion + offset
        assert loss.clm.item() == pytest.approx(case["clm_loss"], abs=1e-12)
        if case["lambda_effective"] < 1:
            assert float(fusion) == pytest.approx(case["fusion_loss"], abs=1e-12), case["name"]
            total = loss.total.detach() + (1 - case["lambda_effective"]) * offset
            assert float(total) == pytest.approx(case["total_loss"], abs=1e-12)
        grad = torch.tensor(case["grad_student_logits"], dtype=torch.float64).flatten(0, 1)
        torch.testing.assert_close(hidden.grad, grad, atol=1e-12, rtol=1e-12)


def divergence(name: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """An objective from its formula, over explicit outcomes."""
    if name == "kl":
        return (p * (p.log() - q.log())).sum()
    if name == "reverse_kl":
        return (q * (q.log() - p.log())).sum()
    if name == "total_variation":
        return (p - q).abs().sum() / 2
    middle = (p + q) / 2
    return (p * (p / middle).log() + q * (q / middle).log()).sum() / 2


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), softcap=st.sampled_from([None, 3.0]))
def test_objectives_equal_their_formulas(name: str, seed: int, softcap: float | None) -> None:
    hidden, head, labels, targets = example(seed, 5, 9, 3)
    one, two = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = fused_loss(one, head, labels, targets, 0.4, objective=name, softcap=softcap)
    loss.total.backward()
    z = two @ head.T
    q = torch.softmax(softcap * torch.tanh(z / softcap) if softcap else z, -1)
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(5):
        kept = q[t, targets.ids[t]]
        outcomes = torch.cat([kept, (1 - kept.sum())[None]])
        p = targets.probabilities[t]
        p = torch.cat([p, (1 - p.sum())[None]])
        expected = expected + targets.weights[t] * divergence(name, p, outcomes)
    assert loss.fusion.item() == pytest.approx(expected.item(), abs=1e-10)
    clm = fused_loss(two, head, labels, None, 1.0, softcap=softcap)
    (0.4 * clm.total + 0.6 * expected).backward()
    torch.testing.assert_close(one.grad, two.grad, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_bear_certainty_and_padding(name: str) -> None:
    hidden, head, labels, targets = example(3, 6, 9, 3)
    p = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(6, 1)
    sure = Targets(targets.ids, p, targets.weights)
    h = hidden.clone().requires_grad_()
    loss = fused_loss(h, head, labels, sure, 0.5, objective=name)
    loss.total.backward()
    assert math.isfinite(loss.fusion.item())
    assert h.grad.isfinite().all()


def test_alm_equals_its_formula_across_pieces_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 3)
    hidden, head, labels, _ = example(11, 8, 10, 2)
    index = torch.tensor([[-1, 0, 0, 0, 1, 1, -1, -1], [2, 2, 2, 2, 3, 3, 3, -1]]).T
    index[labels == IGNORED] = -1
    logprobs = torch.tensor([-4.0, -1.0, -7.0, -3.0], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64)
    chunks = Chunks(index, logprobs, weights, temperature=2.0)
    h, w = (x.clone().requires_grad_() for x in (hidden, head))
    loss = fused_loss(h, w, labels, chunks, 0.4)
    loss.total.backward()
    h2, w2 = (x.clone().requires_grad_() for x in (hidden, head))
    q = torch.log_softmax(h2 @ w2.T, -1)
    valid = labels != IGNORED
    gold = torch.where(valid, q.gather(1, labels.clamp_min(0)[:, None])[:, 0], 0.0)
    torch.testing.assert_close(gold_logprobs(h2, w2, labels), gold.detach())
    fusion = torch.zeros((), dtype=torch.float64)
    for c in range(4):
        at = (index == c).nonzero()[:, 0]
        ours, theirs = gold[at].sum() / 2, logprobs[c] / 2
        p, r = theirs.exp(), ours.exp()
        kl = p * (p / r).log() + (1 - p) * ((1 - p) / (1 - r)).log()
        fusion = fusion + weights[c] * kl
    total = 0.4 * -gold.sum() / valid.sum() + 0.6 * fusion
    total.backward()
    assert loss.total.item() == pytest.approx(total.item(), abs=1e-10)
    assert loss.fusion.item() == pytest.approx(fusion.item(), abs=1e-10)
    torch.testing.assert_close(h.grad, h2.grad, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(w.grad, w2.grad, atol=1e-10, rtol=1e-8)
    same = Chunks(
        index,
        gold.new_zeros(4).index_add(
            0, index[index >= 0], gold.detach()[:, None].expand_as(index)[index >= 0]
        ),
        weights,
    )
    assert alm(gold.detach(), same).item() == pytest.approx(0.0, abs=1e-12)
