"""Ensemble rules: how much each member of an ensemble counts after a prompt, and what is mixed.

A rule is a plain function of what the members found the prompt worth, and its line in
ENSEMBLE_RULES at the foot; its keyword parameters can be given in a recipe. It returns weights that
sum to one. MIXINGS says what these weights mix, and at which level; a rule that is not there mixes
as DEFAULT. How it is mixed is `mixing.py`, `tokenwise.py` and `bytewise.py`.

Shapes: M members, C chunks of the prompt between byte positions where tokens of all members end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fusion.errors import RecipeError, RunError

Level = Literal["sequence", "chunk", "token", "byte"]
# Of a first member to which a rule gives nothing: by token, what no other's map reaches would be
# impossible, and one such token would make a whole text so.
LEAST = 0.01
WORDS = {
    "sequence": "by sequence",
    "chunk": "by chunk between common token ends",
    "token": "by token of the first member's vocabulary",
    "byte": "by byte",
}


@dataclass(frozen=True, slots=True)
class Mixing:
    """What a rule's weights mix, at which level it is scored and generated, and what it asks for.

    reads_prompt: the weights depend on the prompt. levels: at which it can be scored.
    """

    what: Literal["probabilities", "logits", "votes", "selection"]
    scoring: Level
    generation: Level
    reads_prompt: bool = False
    levels: tuple[Level, ...] = ()

    def __str__(self) -> str:
        scoring, generation = WORDS[self.scoring], WORDS[self.generation]
        return f"{self.what}: scoring {scoring}, generation {generation}"


def mean_probability(bits: np.ndarray) -> np.ndarray:
    """Every member counts the same; probabilities are averaged: P = Σ_j p_j / M."""
    return np.full(len(bits), 1.0 / len(bits))


def mean_logit(bits: np.ndarray) -> np.ndarray:
    r"""Every member counts the same; logits are averaged: P ∝ Π_j p_j^(1/M).

    A member that is sure that something is impossible vetoes it, which it cannot do where
    probabilities are averaged. A token of the first member's vocabulary has from another the
    probability of the first token by which that one would say it, as logits need a value each.
    """
    return np.full(len(bits), 1.0 / len(bits))


def packllm_sim(bits: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    r"""Members that find the prompt likelier count more: w = softmax(−bits / temperature).

    bits: (M,), bits per byte of the prompt; equal where there is no prompt.

    Relative to the paper (PackLLM 2404.11531, section 3.2): it takes the prompt's perplexity a
    token; here bits a byte, since members cut the prompt into different tokens.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature:g}: should be above 0")
    w = np.exp(-(bits - bits.min()) / temperature)
    return w / w.sum()


def packllm_opt(
    bits: np.ndarray, chunks: np.ndarray | None = None, *, step: float = 0.05
) -> np.ndarray:
    r"""Weights under which the mixture finds the prompt likeliest, found greedily.

        a = argmax_{a in {0, step, …, 1}} Σ_c log((1 − a) P_mixed(c) + a P_j(c))

    Members join in order of their bits per byte; each takes the share a of the mixture so far. The
    mixture's bits per byte are so never above the best member's.
    chunks: (M, C), natural log-probabilities; without them the whole prompt is one chunk.

    Relative to the paper (PackLLM 2404.11531, section 3.2): it mixes logits of tokens that a map
    pairs; here probabilities of the same bytes. Its grid is 0.05, too.
    """
    if not 0 < step <= 1:
        raise ValueError(f"step {step:g}: should be above 0 and at most 1")
    if chunks is None or not chunks.size:
        if not np.ptp(bits):
            return np.full(len(bits), 1.0 / len(bits))  # no prompt tells them apart
        chunks = -np.log(2) * bits[:, None]
    grid = np.minimum(np.arange(0, 1 + step, step), 1.0)
    first, *rest = np.argsort(bits, kind="stable").tolist()
    w = np.zeros(len(bits))
    w[first], mixed = 1.0, chunks[first]
    with np.errstate(divide="ignore"):
        for member in rest:
            tried = np.logaddexp(
                np.log1p(-grid)[:, None] + mixed, np.log(grid)[:, None] + chunks[member]
            )
            best = int(tried.sum(axis=1).argmax())
            mixed, share = tried[best], grid[best]
            w *= 1 - share
            w[member] = share
    return w


def top1(bits: np.ndarray) -> np.ndarray:
    """Only the member that finds the prompt likeliest counts; a tie goes to the earlier one."""
    w = np.zeros(len(bits))
    w[int(np.argmin(bits))] = 1.0
    return w


def majority_vote(bits: np.ndarray) -> np.ndarray:
    """Each member votes for the choice it finds likeliest, or for its own text; most votes win.

    A choice's log-likelihood is the mean, as probabilities of the whole, of the members that voted
    for the winner; so its largest is the winner's. Votes that are level: the likelier choice or
    text wins.
    """
    return np.full(len(bits), 1.0 / len(bits))


def byte_exact(bits: np.ndarray) -> np.ndarray:
    """Every member counts the same; probabilities of the next byte are averaged, without a map.

    Members of one tokenizer are mixed by token, which is exact, too, and a member that is all of
    the weight is given back as it is. So one model and its copies score as that model does: by its
    own tokens. Across tokenizers a choice has the probability that the text goes on with its bytes,
    however they are cut and whatever follows, which is not the same (`bytewise.py`).
    """
    return np.full(len(bits), 1.0 / len(bits))


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """What a recipe may set for a rule: its keyword-only parameters."""
    found = inspect.signature(ENSEMBLE_RULES[name]).parameters
    return {key: p for key, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def mixing(rule: str, level: Level | None = None) -> Mixing:
    """What a rule mixes, scored at the level that is given, or at the rule's own."""
    found = MIXINGS.get(rule, DEFAULT)
    return replace(found, scoring=level) if level else found


def problems(
    rule: str,
    given: dict[str, Any],
    members: int,
    weights: Sequence[float] | None,
    level: str | None,
) -> list[tuple[str, str]]:
    """What is wrong with an ensemble's settings, as (key, sentence)."""
    out = []
    try:
        ENSEMBLE_RULES[rule](np.array([1.0, 2.0]), **given)
    except (ValueError, TypeError) as error:
        out.append(("parameters", str(error)))
    allowed = (own := MIXINGS.get(rule, DEFAULT)).levels or (own.scoring,)
    if level is not None and level not in allowed:
        out.append(("level", f"'{level}' does not go with {rule}; allowed: {', '.join(allowed)}"))
    if weights is None:
        return out
    if len(weights) != members:
        out.append(("weights", f"{len(weights)} for {members} members; give one for each"))
    elif not all(np.isfinite(w) and w >= 0 for w in weights):
        shown = ", ".join(f"{w:g}" for w in weights)
        out.append(("weights", f"{shown}: each should be a number from 0 on"))
    elif abs(sum(weights) - 1) > 1e-6:
        out.append(("weights", f"sum to {sum(weights):g}; they should sum to 1"))
    elif _by_token(own.what, level or own.scoring) and weights[0] == 0 < max(weights) < 1:
        # Its vocabulary is spoken: a token that no other map reaches would be impossible.
        out.append(("weights", "the first member's is 0, but at level token it must count"))
    return out


def _by_token(what: str, scoring: str) -> bool:
    """Whether what is scored are probabilities of the first member's tokens."""
    return what == "probabilities" and scoring == "token"


class Weighing:
    """A rule with its parameters and the weights that a recipe gives, checked.

    Raises RecipeError with all that is wrong.
    """

    def __init__(
        self,
        rule: str,
        given: dict[str, Any],
        members: int,
        weights: Sequence[float] | None = None,
        level: Level | None = None,
    ) -> None:
        if rule not in ENSEMBLE_RULES:
            raise RecipeError(f"rule '{rule}' is unknown; known: {', '.join(ENSEMBLE_RULES)}")
        wrong = problems(rule, given, members, weights, level)
        if wrong:
            raise RecipeError("; ".join(f"ensemble.{key}: {what}" for key, what in wrong))
        self.rule, self.given = rule, given
        self.mixing = mixing(rule, level)
        self.prior = np.full(members, 1.0 / members) if weights is None else np.array(weights)
        self.alive = np.flatnonzero(self.prior)

    @property
    def reads_prompt(self) -> bool:
        """Whether anything is asked about the prompt: not where one member is all."""
        return self.mixing.reads_prompt and len(self.alive) > 1

    def __call__(self, bits: np.ndarray, chunks: np.ndarray | None = None) -> np.ndarray:
        """Weights (M,) that sum to one; members that a recipe gives nothing are not asked.

        By token, where a rule gives several others all of it, the first has LEAST.
        RunError where a member has no finite bits, or the rule gives no distribution.
        """
        some = self.alive
        if len(some) == 1:
            return np.eye(len(self.prior))[some[0]]
        if not np.isfinite(bits[some]).all():
            shown = ", ".join(f"{b:g}" for b in bits)
            raise RunError(
                f"{self.rule}: its members find a prompt {shown} bits per byte; a model whose "
                "probabilities are not finite cannot be weighed: check its weights and dtype"
            )
        rule, given = ENSEMBLE_RULES[self.rule], self.given
        if chunks is not None and "chunks" in inspect.signature(rule).parameters:
            given = given | {"chunks": chunks[some]}
        own = np.asarray(rule(bits[some], **given), dtype=np.float64)
        if own.shape != some.shape or not (own >= 0).all() or not abs(own.sum() - 1) < 1e-6:
            raise RunError(f"rule '{self.rule}' gave {own}: not a weight for each member")
        w = np.zeros(len(self.prior))
        w[some] = own * self.prior[some]
        # What a rule selects may be what a recipe weighs least; the rest is as the rule says.
        w /= w.sum()
        if (
            w[0] == 0
            and np.count_nonzero(w) > 1
            and _by_token(self.mixing.what, self.mixing.scoring)
        ):
            w = np.append(LEAST, (1 - LEAST) * w[1:])
        return w


ENSEMBLE_RULES: dict[str, Callable[..., np.ndarray]] = {
    "mean_probability": mean_probability,
    "mean_logit": mean_logit,
    "packllm_sim": packllm_sim,
    "packllm_opt": packllm_opt,
    "top1": top1,
    "majority_vote": majority_vote,
    "byte_exact": byte_exact,
}

ANY: tuple[Level, ...] = ("chunk", "sequence", "token", "byte")
DEFAULT = Mixing("probabilities", "chunk", "token", reads_prompt=True, levels=ANY)
MIXINGS: dict[str, Mixing] = {
    "mean_probability": replace(DEFAULT, reads_prompt=False),
    "mean_logit": Mixing("logits", "token", "token"),
    "top1": Mixing("selection", "sequence", "sequence", reads_prompt=True),
    "majority_vote": Mixing("votes", "sequence", "sequence"),
    "byte_exact": Mixing("probabilities", "byte", "token"),
}
