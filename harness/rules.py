"""Ensemble rules: how much each member of an ensemble counts after a prompt.

A rule is a plain function of the members' bits per byte on the prompt and its line in
ENSEMBLE_RULES at the foot; its keyword parameters can be given in a recipe. It returns weights that
sum to one. What is mixed with them, and where, is `ensembles.py`.

Shapes: M members.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np


def mean_probability(bits: np.ndarray) -> np.ndarray:
    """Every member counts the same: w = 1 / M."""
    return np.full(len(bits), 1.0 / len(bits))


def packllm_sim(bits: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    r"""Members that find the prompt likelier count more: w = softmax(−bits / temperature).

    bits: (M,), bits per byte of the prompt; equal where there is no prompt.

    Relative to the paper (PackLLM 2404.11531, section 3.2): it takes the prompt's perplexity a
    token; here bits a byte, since members cut the prompt into different tokens.
    """
    w = np.exp(-(bits - bits.min()) / temperature)
    return w / w.sum()


def top1(bits: np.ndarray) -> np.ndarray:
    """Only the member that finds the prompt likeliest counts; a tie goes to the earlier one."""
    w = np.zeros(len(bits))
    w[int(np.argmin(bits))] = 1.0
    return w


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """What a recipe may set for a rule: its keyword-only parameters."""
    found = inspect.signature(ENSEMBLE_RULES[name]).parameters
    return {key: p for key, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


ENSEMBLE_RULES: dict[str, Callable[..., np.ndarray]] = {
    "mean_probability": mean_probability,
    "packllm_sim": packllm_sim,
    "top1": top1,
}
