"""The chunked loss against dense arithmetic in float64 and against recorded values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion import losses
from fusion.losses import IGNORED, Targets, fused_loss


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
        torch.cat([targets.ids, torch.zeros(6, 4, dtype=torch.long)], 1),
        torch.cat([targets.probabilities, torch.zeros(6, 4)], 1),
        targets.weights,
    )
    grads = []
    for given_targets in (targets, wide):
        h = hidden.float().requires_grad_()
        fused_loss(h, head.float(), labels, in_float32(given_targets), 0.3).total.backward()
        grads.append(h.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-7, rtol=1e-6)


RECORDED = ("typical", "flat-teacher", "k-1", "k-equals-v", "peaked-teacher", "peaked-student")


@pytest.mark.parametrize("name", RECORDED)
def test_the_tail_bucket_equals_the_recorded_float64_values(shared: Path, name: str) -> None:
    recorded = json.loads((shared / "golden" / "fusion.json").read_text())["sparse_kl"]["cases"]
    case = next(c for c in recorded if c["name"] == name)
    logits = torch.tensor(case["student_logits"], dtype=torch.float32)
    rows, width = logits.shape
    for row in range(rows):
        hidden = logits[row : row + 1].clone().requires_grad_()
        targets = Targets(
            torch.tensor(case["ids"][row : row + 1]),
            torch.tensor(case["p"][row : row + 1]),
            torch.ones(1),
        )
        loss = fused_loss(hidden, torch.eye(width), torch.zeros(1).long(), targets, 0.0)
        loss.total.backward()
        # float32 arithmetic against float64: relative rounding of sums over a dozen terms.
        expected = case["loss"]["tail_bucket"][row]
        assert loss.fusion.item() == pytest.approx(expected, rel=2e-5, abs=2e-6)
        torch.testing.assert_close(
            hidden.grad[0].double(),
            torch.tensor(case["grad"]["tail_bucket"][row], dtype=torch.float64),
            atol=2e-6,
            rtol=2e-5,
        )
