"""Causal-LM and fusion loss in one pass over the hidden states, with one log-sum-exp.

    L = λ · CLM + (1 − λ) · D(P ‖ Q)           (FuseLLM 2401.10491, equation 5; λ is `clm_weight`)

The output head is applied to a chunk of positions at a time and gradients are formed there and
then, so logits for a whole sequence never exist, and the cost does not depend on how many sources
were fused into the targets. D is an objective: a plain function over the kept outcomes and the tail
as one more, and its line in OBJECTIVES at the foot. `alm` compares chunks of text instead, which
needs no position and no token in common.

Shapes: T positions, D hidden width, V target vocabulary, K entries kept a position, M sources,
C chunks of text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # positions whose logits exist at once
IGNORED = -100  # a label that carries no causal-LM loss


@dataclass(frozen=True, slots=True)
class Targets:
    """Fused next-token targets of T positions, sparse.

    ids (T, K) int64, −1 behind the last; probabilities (T, K) float32, 0 there; weights (T,)
    float32, what a position's fusion loss counts (0: not covered).
    """

    ids: Tensor
    probabilities: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Chunks:
    """What sources say to whole chunks of text, for `alm`.

    index (T, M) int64: the chunk that each position's label belongs to, −1 for none; logprobs (C,)
    float32: the source's log-likelihood of each chunk; weights (C,) float32. temperature divides
    both sides' log-likelihoods.
    """

    index: Tensor
    logprobs: Tensor
    weights: Tensor
    temperature: float = 1.0


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
        objective: Callable[..., Parts],
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        fuses = ids.shape[1] > 0 and clm_weight < 1
        wide = _wide(hidden)
        clm = hidden.new_zeros((), dtype=wide)
        fusion = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=wide) if head.requires_grad else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            h = hidden[rows]
            capped = _scores(h, head, softcap)
            lse = torch.logsumexp(capped, dim=-1)
            a = clm_weight * label_weights[rows]
            clm += (label_weights[rows] * (lse - _at(capped, labels[rows]))).sum()
            q = torch.exp(capped - lse[:, None])
            scale = a.clone()
            at_ids = None
            if fuses:
                b = (1 - clm_weight) * fusion_weights[rows]
                p = probabilities[rows].to(wide)
                padded = ids[rows] < 0
                k = torch.where(padded, ids[rows, :1], ids[rows]).clamp_min(0)
                log_q = capped.gather(1, k) - lse[:, None]
                at_k = q.gather(1, k)
                # The tail is one bucket. Its mass is summed, not taken as 1 − Σ q_k, which float32
                # rounds to nothing where the target is sure.
                u = q.scatter_(1, k, 0.0).sum(-1) + at_k[:, 0] * padded[:, 0]
                q.scatter_(1, k, at_k)
                q_kept = at_k.masked_fill(padded, 0.0)
                t = (1 - p.sum(-1)).clamp_min(0)
                t = torch.where(u > 0, t, 0.0)  # every token is kept: what is left is rounding
                value, pull, pull_tail = objective(p, t, q_kept, log_q, u)
                fusion += (fusion_weights[rows] * value).sum()
                per_tail = pull_tail / torch.where(u > 0, u, 1.0)
                scale = scale + b * (per_tail - pull.sum(-1) - pull_tail)
                at_ids = b[:, None] * (pull - q_kept * per_tail[:, None])
            grad = q.mul_(scale[:, None])
            if at_ids is not None:
                grad.scatter_add_(1, k, at_ids)
            grad.scatter_add_(1, labels[rows].clamp_min(0)[:, None], -a[:, None])
            if softcap:
                grad *= 1 - (capped / softcap) ** 2
            g = grad.to(h.dtype)
            grad_hidden[rows] = g @ head.to(h.dtype)
            if grad_head is not None:
                grad_head += (g.T @ h).to(wide)
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
        return hidden, head, None, None, None, None, None, None, None, None


def _wide(hidden: Tensor) -> torch.dtype:
    """What is summed in: float32, or float64 where that is what comes in."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _scores(hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    z = (hidden @ head.to(hidden.dtype).T).to(_wide(hidden))
    return softcap * torch.tanh(z / softcap) if softcap else z


def _at(scores: Tensor, index: Tensor) -> Tensor:
    return scores.gather(1, index.clamp_min(0)[:, None])[:, 0]


def gold_logprobs(
    hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, softcap: float | None = None
) -> Tensor:
    """Log-probabilities of the labels, (T,), without gradient; 0 where there is none."""
    found = []
    with torch.no_grad():
        for start in range(0, hidden_TD.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            scores = _scores(hidden_TD[rows], head_VD, softcap)
            found.append(_at(scores, labels_T[rows]) - torch.logsumexp(scores, dim=-1))
    return torch.where(labels_T == IGNORED, 0.0, torch.cat(found))


def fused_loss(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    targets: Targets | Chunks | None,
    clm_weight: float,
    *,
    objective: str = "kl",
    label_weights: Tensor | None = None,
    softcap: float | None = None,
) -> Loss:
    r"""λ · CLM + (1 − λ) · D(P ‖ Q), with values and gradients as a dense softmax would give.

        D[t] over the outcomes k = 1 … K and the tail:   t = 1 − Σ p_k,   u = 1 − Σ q_k
        ∂D/∂z_j = π_j − q_j Σ_i π_i,   π = q ∂D/∂q,   the tail's π shared as the target shares u

    labels_T: next tokens; IGNORED where there is none. label_weights (T,): what each label counts;
    by default one over the number of labels. targets.weights likewise for the fusion part.
    objective: a key of OBJECTIVES; Chunks have their own. Values are nats. With targets None or
    λ = 1 this is exactly the causal-LM loss. Arithmetic in float32, or float64 if hidden_TD is.

    Relative to the paper: P keeps the mass outside the top K as one bucket, where the published
    code renormalises over K; positions that no source covers carry no fusion loss, where it uses
    one-hot.
    """
    valid = labels_T != IGNORED
    if label_weights is None:
        label_weights = valid.to(_wide(hidden_TD)) / valid.sum().clamp_min(1)
    weights = torch.where(valid, label_weights, 0.0).to(_wide(hidden_TD))
    if isinstance(targets, Chunks):
        return _chunk_loss(hidden_TD, head_VD, labels_T, targets, clm_weight, weights, softcap)
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
        OBJECTIVES[objective],
        softcap,
    )
    return Loss(total, clm.detach(), fusion.detach())


def _chunk_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    chunks: Chunks,
    clm_weight: float,
    weights: Tensor,
    softcap: float | None,
) -> Loss:
    """Both parts as a function of the labels' log-probabilities, whose gradient weighs the labels.

    A chunk may lie across two of the pieces that the head is applied to, so the log-probabilities
    come first and the gradient in a second pass.
    """
    gold = gold_logprobs(hidden, head, labels, softcap).requires_grad_()
    with torch.enable_grad():
        clm = -(weights * gold).sum()
        fusion = alm(gold, chunks)
        total = clm_weight * clm + (1 - clm_weight) * fusion
        (slope,) = torch.autograd.grad(total, gold)
    none = torch.zeros((len(labels), 0), device=hidden.device)
    surrogate, _, _ = _ChunkedLoss.apply(
        hidden, head, labels, -slope, none.long(), none, weights, 1.0, kl, softcap
    )
    value = total.detach() - surrogate.detach()
    return Loss(surrogate + value, clm.detach(), fusion.detach())


def alm(gold_T: Tensor, chunks: Chunks) -> Tensor:
    r"""Approximate likelihood matching: both models should find each chunk of text as likely.

        Σ_c w_c KL(Bernoulli(e^{l_s(c)/T}) ‖ Bernoulli(e^{l_t(c)/T})),   l_t(c) = Σ_{t in c} gold[t]

    Minixhofer et al. 2503.20083. Relative to the paper: chunks are all runs between neighbouring
    common byte ends; it filters them by the tokenizers' bias.
    """
    inside = chunks.index >= 0
    spread = gold_T[:, None].expand_as(chunks.index)[inside]
    ours = torch.zeros_like(chunks.logprobs, dtype=gold_T.dtype)
    ours = ours.index_add(0, chunks.index[inside], spread) / chunks.temperature
    theirs = chunks.logprobs.to(gold_T.dtype) / chunks.temperature
    nearly = -torch.finfo(gold_T.dtype).eps  # e^l of 1 would make the other outcome impossible
    ours, theirs = ours.clamp_max(nearly), theirs.clamp_max(nearly)
    p = theirs.exp()
    other = torch.log(-torch.expm1(theirs)) - torch.log(-torch.expm1(ours))
    return (chunks.weights * (p * (theirs - ours) + (1 - p) * other)).sum()


# An objective takes p (T, K), the tail t (T,), the target model's q and log q (T, K) and its tail u
# (T,), p and q 0 where padded, and gives D (T,) and q ∂D/∂q for the kept (T, K) and the tail (T,).
Parts = tuple[Tensor, Tensor, Tensor]


def kl(p: Tensor, t: Tensor, q: Tensor, log_q: Tensor, u: Tensor) -> Parts:
    r"""KL(P ‖ Q) = Σ p log(p / q): the target spreads over all that the sources hold possible."""
    value = torch.xlogy(p, p).sum(-1) - (p * log_q).sum(-1)
    value += torch.xlogy(t, t) - t * torch.where(u > 0, u, 1.0).log()
    return value, -p, -t


LEAST = 1e-6


def reverse_kl(p: Tensor, t: Tensor, q: Tensor, log_q: Tensor, u: Tensor) -> Parts:
    r"""KL(Q ‖ P) = Σ q log(q / p): the target settles on what the sources hold likely.

    A p below 1e-6, such as the tail of a one-hot row, counts as that; it would be infinite.
    """
    ratio = log_q - p.clamp_min(LEAST).log()
    tail_ratio = torch.where(u > 0, u, 1.0).log() - t.clamp_min(LEAST).log()
    return (q * ratio).sum(-1) + u * tail_ratio, q * (ratio + 1), u * (tail_ratio + 1)


def jsd(p: Tensor, t: Tensor, q: Tensor, log_q: Tensor, u: Tensor) -> Parts:
    r"""½ KL(P ‖ M) + ½ KL(Q ‖ M), M = (P + Q) / 2: bounded by ln 2 nats."""
    value, pulls = torch.zeros_like(u), []
    for one, other in ((p, q), (t[:, None], u[:, None])):
        middle = (one + other) / 2
        middle = torch.where(middle > 0, middle, 1.0)
        pull = torch.xlogy(other, other / middle) / 2
        value = value + (torch.xlogy(one, one / middle) / 2 + pull).sum(-1)
        pulls.append(pull)
    return value, pulls[0], pulls[1][:, 0]


def total_variation(p: Tensor, t: Tensor, q: Tensor, log_q: Tensor, u: Tensor) -> Parts:
    r"""½ Σ |p − q|: the most that any event's probability can differ."""
    value = ((p - q).abs().sum(-1) + (t - u).abs()) / 2
    return value, q * (q - p).sign() / 2, u * (u - t).sign() / 2


OBJECTIVES: dict[str, Callable[..., Parts]] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
}
