"""Causal-LM and fusion loss in one pass over the hidden states, with one log-sum-exp.

    L = λ · CLM + (1 − λ) · KL(P ‖ Q)          (FuseLLM 2401.10491, equation 5; λ is `clm_weight`)

The output head is applied to a chunk of positions at a time and gradients are formed there and
then, so logits for a whole sequence never exist, and the cost does not depend on how many sources
were fused into the targets.

Shapes: T positions, D hidden width, V target vocabulary, K entries kept a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # positions whose logits exist at once
IGNORED = -100  # a label that carries no causal-LM loss


@dataclass(frozen=True, slots=True)
class Targets:
    """Fused next-token targets of T positions, sparse.

    ids (T, K) int64, padded with 0; probabilities (T, K) float32, 0 where padded; weights (T,)
    float32, what a position's fusion loss counts (0: not covered).
    """

    ids: Tensor
    probabilities: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """total carries the gradient; clm and fusion are its parts in nats a position, detached."""

    total: Tensor
    clm: Tensor
    fusion: Tensor


class _ChunkedLoss(torch.autograd.Function):
    """Sums of weighted losses; gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        ids: Tensor,
        probabilities: Tensor,
        fusion_weights: Tensor,
        clm_weight: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        fuses = ids.shape[1] > 0 and clm_weight < 1
        clm = hidden.new_zeros((), dtype=torch.float32)
        fusion = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if head.requires_grad else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            h = hidden[rows]
            z = (h @ head.to(h.dtype).T).float()
            capped = softcap * torch.tanh(z / softcap) if softcap else z
            lse = torch.logsumexp(capped, dim=-1)
            a = clm_weight * label_weights[rows]
            clm += (label_weights[rows] * (lse - _at(capped, labels[rows]))).sum()
            q = torch.exp(capped - lse[:, None])
            scale = a.clone()
            at_ids = None
            if fuses:
                b = (1 - clm_weight) * fusion_weights[rows]
                p = probabilities[rows]
                k = torch.where(p > 0, ids[rows], ids[rows, :1])  # padding repeats the first id
                log_q = capped.gather(1, k) - lse[:, None]
                at_k = q.gather(1, k)
                q_kept = torch.where(p > 0, at_k, 0.0)
                t = (1 - p.sum(-1)).clamp_min(0)
                # The tail is one bucket. Its mass is summed, not taken as 1 − Σ q_k, which float32
                # rounds to nothing where the target is sure.
                u = q.scatter_(1, k, 0.0).sum(-1)
                q.scatter_(1, k, at_k)
                t = torch.where(u > 0, t, 0.0)  # every token is kept: what is left is rounding
                u = torch.where(u > 0, u, 1.0)
                kl = torch.xlogy(p, p).sum(-1) - (p * log_q).sum(-1)
                kl += torch.xlogy(t, t) - t * u.log()
                fusion += (fusion_weights[rows] * kl).sum()
                scale = scale + b * (1 - t / u)
                at_ids = b[:, None] * (q_kept * (t / u)[:, None] - p)
            grad = q.mul_(scale[:, None])
            if at_ids is not None:
                grad.scatter_add_(1, k, at_ids)
            grad.scatter_add_(1, labels[rows].clamp_min(0)[:, None], -a[:, None])
            if softcap:
                grad *= 1 - (capped / softcap) ** 2
            g = grad.to(h.dtype)
            grad_hidden[rows] = g @ head.to(h.dtype)
            if grad_head is not None:
                grad_head += (g.T @ h).float()
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        total = clm_weight * clm + (1 - clm_weight) * fusion
        ctx.mark_non_differentiable(clm, fusion)
        return total, clm, fusion

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        head = None if grad_head is None else (grad_head * grad_total).to(ctx.head_dtype)
        return hidden, head, None, None, None, None, None, None, None


def _at(scores: Tensor, index: Tensor) -> Tensor:
    return scores.gather(1, index.clamp_min(0)[:, None])[:, 0]


def fused_loss(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    targets: Targets | None,
    clm_weight: float,
    *,
    label_weights: Tensor | None = None,
    softcap: float | None = None,
) -> Loss:
    r"""λ · CLM + (1 − λ) · KL(P ‖ Q), with values and gradients as a dense softmax would give.

        KL[t] = Σ_k p_k (log p_k − log q_k) + m (log m − log u),   m = 1 − Σ p_k,   u = 1 − Σ q_k
        ∂KL/∂z = q − p̃,   p̃ = p_k on kept ids, m q_j / u elsewhere

    labels_T: next tokens; IGNORED where there is none. label_weights (T,): what each label counts;
    by default one over the number of labels. targets.weights likewise for the fusion part. Values
    are nats. With targets None or λ = 1 this is exactly the causal-LM loss.

    Relative to the paper: P keeps the mass outside the top K as one bucket, where the published
    code
    renormalises over K; positions that no source covers carry no fusion loss, where it uses
    one-hot.
    """
    valid = labels_T != IGNORED
    if label_weights is None:
        label_weights = valid.float() / valid.sum().clamp_min(1)
    weights = torch.where(valid, label_weights, 0.0).float()
    if targets is None:
        none = torch.zeros((len(labels_T), 0), device=hidden_TD.device)
        targets = Targets(none.long(), none, torch.zeros_like(weights))
        clm_weight = 1.0
    total, clm, fusion = _ChunkedLoss.apply(
        hidden_TD,
        head_VD,
        labels_T,
        weights,
        targets.ids,
        targets.probabilities,
        targets.weights,
        clm_weight,
        softcap,
    )
    return Loss(total, clm.detach(), fusion.detach())
