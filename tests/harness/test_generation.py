"""Samples: what they depend on, how often each token comes, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from fusion.errors import RunError
from harness.generation import Sampling, sampling
from harness.scoring import SharedPrefixLM

LOGITS = np.array([1.0, -2.0, 0.5, 3.0, 0.0])


def asked(prompt: str, **how: Any) -> Instance:
    arguments = {"until": ["never-said"], "max_gen_toks": 6, "do_sample": True, **how}
    return Instance("generate_until", {}, (prompt, arguments), 0)


def share(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> np.ndarray:
    """How often each of LOGITS' tokens came in 20,000 draws."""
    counts: Counter[int] = Counter()
    for key in range(200):
        drawn = Sampling(temperature, top_p, top_k, key)
        counts.update(drawn.pick(LOGITS, step) for step in range(100))
    return np.array([counts[token] / 20_000 for token in range(len(LOGITS))])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    odds = np.exp(LOGITS / temperature)
    # Five standard errors of a share of 20,000 are at most 0.018.
    assert share(temperature) == pytest.approx(odds / odds.sum(), abs=0.018)


def test_only_the_likeliest_tokens_are_left() -> None:
    odds = np.exp(LOGITS)
    two = np.where(LOGITS >= 1.0, odds, 0.0)
    # The first has 0.80 of the whole, the first two 0.90.
    for found in (share(top_k=2), share(top_p=0.85)):
        assert found == pytest.approx(two / two.sum(), abs=0.018)
    assert share(top_p=0.5)[3] == share(top_k=1)[3] == 1.0


def test_a_temperature_near_zero_is_greedy() -> None:
    assert share(temperature=1e-6)[3] == 1.0
    assert sampling({"do_sample": True, "temperature": 0}, 17, "x", 0) is None
    assert sampling({"temperature": 0.8, "do_sample": False}, 17, "x", 0) is None
    assert sampling({"temperature": 0.8}, 17, "x", 0) is not None


@pytest.mark.parametrize("how", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -3}])
def test_values_out_of_range_are_refused(how: dict[str, float]) -> None:
    with pytest.raises(RunError, match="allowed: temperature from 0"):
        sampling({"do_sample": True, **how}, 17, "x", 0)


def test_samples_do_not_depend_on_what_is_generated_beside_them(tiny: dict[str, Path]) -> None:
    lm = SharedPrefixLM(str(tiny["llama"]))
    requests = [asked(p, top_p=0.95) for p in ("The baker", "A teacher reads", "x") for _ in "123"]
    found = lm.generate(requests)
    assert len({made.text for made in found[:3]}) == 3
    lm.generate_rows = 1
    assert lm.generate(requests) == found
    assert lm.generate(requests[3:] + requests[:3]) == found[3:] + found[:3]
    lm.seed = 18
    assert lm.generate(requests) != found


def test_sampling_at_temperature_zero_is_the_greedy_text(tiny: dict[str, Path]) -> None:
    lm = SharedPrefixLM(str(tiny["llama"]))
    drawn = lm.generate([asked("The baker", temperature=1e-7)])
    assert drawn == lm.generate([asked("The baker", do_sample=False)])
