"""Ensembles of any vocabularies: the laws that every rule obeys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from fusion.models import load_tokenizer
from fusion.vocabulary import build
from harness.ensembles import EnsembleLM, mix_chunks
from harness.rules import ENSEMBLE_RULES
from harness.scoring import SharedPrefixLM

RULES = pytest.mark.parametrize("rule", ENSEMBLE_RULES)
CHOICES = [
    Instance("loglikelihood", {}, (context, choice), 0)  # type: ignore[arg-type]
    for context in ("The baker counts", "A teacher reads a long letter. Then 😀", "")
    for choice in (" seven apples", " nobody asks", " x")
]
TEXTS = [Instance("loglikelihood_rolling", {}, ("my sister paints the garden gate at noon",), 0)]  # type: ignore[arg-type]


def generation(prompt: str) -> Instance:
    arguments = {"until": ["never-said"], "max_gen_toks": 9}
    return Instance("generate_until", {}, (prompt, arguments), 0)  # type: ignore[arg-type]


PROMPTS = [generation(p) for p in ("The baker", "our neighbour walks along the river", "a 你")]


def ensemble(tiny: dict[str, Path], rule: str, *names: str) -> EnsembleLM:
    members = [SharedPrefixLM(str(tiny[name])) for name in names]
    first = load_tokenizer(tiny[names[0]])
    maps = [build(load_tokenizer(tiny[name]), first) for name in names[1:]]
    return EnsembleLM(members, rule, {}, maps)


@RULES
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_an_ensemble_of_one_is_that_model(tiny: dict[str, Path], rule: str, name: str) -> None:
    alone = SharedPrefixLM(str(tiny[name]))
    one = ensemble(tiny, rule, name)
    for mine, other in zip(one.loglikelihood(CHOICES), alone.loglikelihood(CHOICES), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-9)
        assert mine[1] == other[1]
    assert one.loglikelihood_rolling(TEXTS) == pytest.approx(alone.loglikelihood_rolling(TEXTS))
    assert one.generate(PROMPTS) == alone.generate(PROMPTS)


@RULES
def test_an_ensemble_of_copies_is_the_copy(tiny: dict[str, Path], rule: str) -> None:
    alone = SharedPrefixLM(str(tiny["llama"]))
    both = ensemble(tiny, rule, "llama", "llama")
    for mine, other in zip(both.loglikelihood(CHOICES), alone.loglikelihood(CHOICES), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-5)
    assert [g.text for g in both.generate(PROMPTS)] == [g.text for g in alone.generate(PROMPTS)]


@pytest.mark.parametrize(
    "names", [("llama", "gemma"), ("gemma", "neox"), ("neox", "llama", "gemma")]
)
def test_a_mixture_lies_between_its_members(tiny: dict[str, Path], names: tuple[str, ...]) -> None:
    mixed = ensemble(tiny, "mean_probability", *names).loglikelihood(CHOICES)
    alone = [SharedPrefixLM(str(tiny[name])).loglikelihood(CHOICES) for name in names]
    for index, (total, _) in enumerate(mixed):
        members = [scores[index][0] for scores in alone]
        # By chunk, so it can exceed the best member overall, but never fall below all of them
        # by more than the log of their number.
        assert total >= min(members) - np.log(len(names)) - 1e-6
    assert len(ensemble(tiny, "packllm_sim", *names).generate(PROMPTS)) == len(PROMPTS)


def test_weight_one_for_the_first_gives_the_first(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENSEMBLE_RULES, "first", lambda bits: np.eye(len(bits))[0])
    alone = SharedPrefixLM(str(tiny["llama"]))
    both = ensemble(tiny, "first", "llama", "gemma")
    for mine, other in zip(both.loglikelihood(CHOICES), alone.loglikelihood(CHOICES), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-5)
    assert [g.text for g in both.generate(PROMPTS)] == [g.text for g in alone.generate(PROMPTS)]


def test_chunks_are_mixed_between_common_ends() -> None:
    one = np.log([0.5, 0.5, 0.2])
    two = np.log([0.1, 0.4])
    ends = [np.array([1, 2, 4]), np.array([2, 4])]
    expected = np.log(0.5 * 0.25 + 0.5 * 0.1) + np.log(0.5 * 0.2 + 0.5 * 0.4)
    assert mix_chunks([one, two], ends, np.array([0.5, 0.5])) == pytest.approx(expected)
    # No end in common but the last: the whole is one chunk.
    ends = [np.array([1, 2, 4]), np.array([3, 4])]
    expected = np.log(0.5 * 0.05 + 0.5 * 0.04)
    assert mix_chunks([one, two], ends, np.array([0.5, 0.5])) == pytest.approx(expected)


@RULES
def test_weights_are_a_distribution_and_follow_the_prompt(rule: str) -> None:
    for bits in (np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0]), np.array([5.0])):
        weights = ENSEMBLE_RULES[rule](bits)
        assert weights.sum() == pytest.approx(1)
        assert (weights >= 0).all()
        assert (np.diff(weights) <= 0).all()
