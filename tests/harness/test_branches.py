"""Trees behind contexts that begin alike: read once, and the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from fusion.vocabulary import build
from harness.branches import Branches, predict
from harness.ensembles import EnsembleLM
from harness.scoring import SharedPrefixLM

SHOTS = "The baker counts seven apples by the river. A teacher reads a long letter. " * 12
QUESTIONS = ["Our neighbour walks", "The old captain paints a", "Nobody saw the"]
CHOICES = [" house", " long letter", " river in spring"]


@pytest.fixture(scope="module")
def models(tiny: dict[str, Path]) -> list[SharedPrefixLM]:
    return [SharedPrefixLM(str(tiny[name])) for name in ("llama", "gemma")]


def trees(model: SharedPrefixLM) -> list[Branches]:
    out = []
    for question in QUESTIONS:
        tree = Branches(model.tok_encode(SHOTS + question))
        for choice in CHOICES:
            tree.path(model.tok_encode(choice, add_special_tokens=False))
        out.append(tree)
    return out


def test_trees_after_a_beginning_predict_what_they_do_by_themselves(
    models: list[SharedPrefixLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models[0]
    before = model.forward_tokens
    shared = predict(model, trees(model))
    between = model.forward_tokens
    monkeypatch.setattr(model, "_grows", False)
    apart = predict(model, trees(model))
    assert 2 * (between - before) < model.forward_tokens - between
    for one, other, tree in zip(shared, apart, trees(model), strict=True):
        nodes = list(range(len(tree.tokens)))
        torch.testing.assert_close(one.logprobs(nodes), other.logprobs(nodes), atol=1e-4, rtol=0)


def test_a_context_that_begins_as_others_do_is_found_as_likely(
    models: list[SharedPrefixLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models[0]
    pairs = [
        (model.tok_encode(SHOTS + q), model.tok_encode(c, add_special_tokens=False))
        for q in QUESTIONS
        for c in CHOICES
    ]
    shared = model.score(pairs, contexts=True)
    monkeypatch.setattr(model, "_grows", False)
    for one, other, (context, _) in zip(shared, model.score(pairs, True), pairs, strict=True):
        assert one.context is not None
        assert other.context is not None
        assert len(one.context) == len(other.context) == len(context) - 1
        torch.testing.assert_close(one.context, other.context, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", ["packllm_sim", "packllm_opt", "mean_logit", "byte_exact"])
def test_ensembles_read_what_their_prompts_begin_with_once(
    models: list[SharedPrefixLM], rule: str
) -> None:
    maps = [build(models[1].tokenizer, models[0].tokenizer)]
    mixed = EnsembleLM(models, rule, {}, maps)
    asked = [
        Instance("loglikelihood", {}, (SHOTS + q, c), i)
        for i, q in enumerate(QUESTIONS)
        for c in CHOICES
    ]
    before = mixed.forward_tokens
    mixed.loglikelihood(asked)
    read = mixed.forward_tokens - before
    once = sum(len(model.tok_encode(SHOTS)) for model in models)
    assert read < 2 * once
