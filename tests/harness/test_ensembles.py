"""Ensembles of any vocabularies: the laws that every rule obeys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from scipy import sparse

from fusion.errors import RecipeError, RunError
from fusion.vocabulary import build
from harness.ensembles import EnsembleLM
from harness.fallback import plain_logits
from harness.rules import ENSEMBLE_RULES
from harness.scoring import SharedPrefixLM

RULES = pytest.mark.parametrize("rule", ENSEMBLE_RULES)
NAMES = ("llama", "gemma", "neox")


def choice(context: str, continuation: str, question: int | None = None) -> Instance:
    metadata = ("task", question, 1)
    return Instance("loglikelihood", {}, (context, continuation), 0, metadata)  # type: ignore[arg-type]


CHOICES = [
    choice(context, continuation)
    for context in ("The baker counts", "A teacher reads a long letter. Then 😀", "")
    for continuation in (" seven apples", " nobody asks", " é 你")
]
TEXTS = [
    Instance("loglikelihood_rolling", {}, (text,), 0)  # type: ignore[arg-type]
    for text in ("my sister paints the garden gate at noon", "é 😀!")
]


def generation(prompt: str, **how: Any) -> Instance:
    arguments = {"until": ["never-said"], "max_gen_toks": 9, **how}
    return Instance("generate_until", {}, (prompt, arguments), 0)


PROMPTS = [generation(p) for p in ("The baker", "our neighbour walks along the river", "a 你")]


@pytest.fixture(scope="module")
def models(tiny: dict[str, Path]) -> dict[str, SharedPrefixLM]:
    return {name: SharedPrefixLM(str(tiny[name])) for name in NAMES}


@pytest.fixture(scope="module")
def maps(models: dict[str, SharedPrefixLM]) -> dict[tuple[str, str], sparse.csr_array]:
    return {(a, b): build(models[a].tokenizer, models[b].tokenizer) for a in NAMES for b in NAMES}


@pytest.fixture(scope="module")
def ensemble(models: dict[str, SharedPrefixLM], maps: dict) -> Any:
    def make(rule: str, *names: str, **settings: Any) -> EnsembleLM:
        found = [maps[name, names[0]] for name in names[1:]]
        return EnsembleLM([models[name] for name in names], rule, {}, found, **settings)

    return make


@RULES
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_an_ensemble_of_one_is_that_model_to_the_bit(
    models: dict[str, SharedPrefixLM], ensemble: Any, rule: str, name: str
) -> None:
    one, alone = ensemble(rule, name), models[name]
    assert one.loglikelihood(CHOICES) == alone.loglikelihood(CHOICES)
    assert one.loglikelihood_rolling(TEXTS) == alone.loglikelihood_rolling(TEXTS)
    assert one.generate(PROMPTS) == alone.generate(PROMPTS)


@RULES
@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
def test_an_ensemble_of_copies_is_the_copy(
    models: dict[str, SharedPrefixLM], ensemble: Any, rule: str, weights: list[float] | None
) -> None:
    alone, both = models["llama"], ensemble(rule, "llama", "llama", weights=weights)
    for mine, other in zip(both.loglikelihood(CHOICES), alone.loglikelihood(CHOICES), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-5)
        assert mine[1] == other[1]
    # Windows of float32 rows: sums of forty terms, each right to seven digits.
    whole = alone.loglikelihood_rolling(TEXTS)
    assert both.loglikelihood_rolling(TEXTS) == pytest.approx(whole, abs=1e-4)
    assert [g.text for g in both.generate(PROMPTS)] == [g.text for g in alone.generate(PROMPTS)]


@RULES
@pytest.mark.parametrize("first", [0, 1])
def test_all_weight_on_one_member_gives_that_member_to_the_bit(
    models: dict[str, SharedPrefixLM], ensemble: Any, rule: str, first: int
) -> None:
    weights = [0.0, 0.0]
    weights[first] = 1.0
    both, alone = ensemble(rule, "llama", "gemma", weights=weights), models[NAMES[first]]
    assert both.loglikelihood(CHOICES) == alone.loglikelihood(CHOICES)
    assert both.loglikelihood_rolling(TEXTS) == alone.loglikelihood_rolling(TEXTS)
    assert both.generate(PROMPTS) == alone.generate(PROMPTS)


def test_a_rule_may_give_all_weight_to_the_first(
    models: dict[str, SharedPrefixLM], ensemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENSEMBLE_RULES, "first", lambda bits: np.eye(len(bits))[0])
    for level in ("chunk", "sequence", "token", "byte"):
        both, alone = ensemble("first", "llama", "gemma", level=level), models["llama"]
        scores = zip(both.loglikelihood(CHOICES), alone.loglikelihood(CHOICES), strict=True)
        assert all(a[0] == pytest.approx(b[0], abs=1e-5) for a, b in scores)
    assert [g.text for g in both.generate(PROMPTS)] == [g.text for g in alone.generate(PROMPTS)]


def test_a_rule_that_gives_the_first_nothing_leaves_no_token_impossible(
    ensemble: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENSEMBLE_RULES, "rest", lambda bits: np.array([0.0, 0.4, 0.6]))
    names = ("neox", "llama", "gemma")
    mixed = ensemble("rest", *names, level="token")
    # No token of the others' goes to this one of the first's.
    (found,) = mixed.loglikelihood([choice("The baker", "!")])
    assert np.isfinite(found[0])
    assert np.isfinite(mixed.loglikelihood_rolling(TEXTS)).all()
    w = mixed.weights("", [])
    assert w.sum() == pytest.approx(1)
    assert 0 < w[0] < 0.02
    assert w[2] / w[1] == pytest.approx(1.5)
    # Where its vocabulary is not what is scored, the rule has its way.
    assert ensemble("rest", *names, level="chunk").weights("", [])[0] == 0


@pytest.mark.parametrize("level", ["chunk", "sequence"])
@pytest.mark.parametrize("names", [("llama", "gemma"), ("neox", "llama", "gemma")])
def test_a_mixture_lies_between_its_members(
    models: dict[str, SharedPrefixLM], ensemble: Any, names: tuple[str, ...], level: str
) -> None:
    mixed = ensemble("mean_probability", *names, level=level).loglikelihood(CHOICES)
    alone = [models[name].loglikelihood(CHOICES) for name in names]
    for index, (total, _) in enumerate(mixed):
        members = [scores[index][0] for scores in alone]
        chunks = 1 if level == "sequence" else len(CHOICES[index].args[1])
        assert min(members) - 1e-6 <= total
        assert total <= sum(sorted(members)[-1:]) + 1e-6 or chunks > 1
        assert total >= max(members) - chunks * np.log(len(names)) - 1e-6


@RULES
@pytest.mark.parametrize("names", [("llama", "gemma"), ("gemma", "neox", "llama")])
def test_every_rule_scores_and_generates_across_vocabularies(
    ensemble: Any, rule: str, names: tuple[str, ...]
) -> None:
    mixed = ensemble(rule, *names)
    scores = mixed.loglikelihood(CHOICES)
    assert all(np.isfinite(total) and total < 0 for total, _ in scores)
    # A question's choices score the same alone as beside others (another batch: float32).
    for index in (1, 5):
        if rule != "majority_vote":  # where who else is there is the point
            (again,) = mixed.loglikelihood(CHOICES[index : index + 1])
            assert again[0] == pytest.approx(scores[index][0], abs=1e-4)
    assert all(np.isfinite(total) and total < 0 for total in mixed.loglikelihood_rolling(TEXTS))
    together = mixed.generate(PROMPTS)
    assert [mixed.generate([prompt])[0].text for prompt in PROMPTS] == [g.text for g in together]


@pytest.mark.parametrize(("rule", "level"), [("mean_probability", "token"), ("mean_logit", None)])
def test_tokens_are_mixed_where_both_members_stand_at_one_byte(
    models: dict[str, SharedPrefixLM], ensemble: Any, rule: str, level: str | None
) -> None:
    first, second = models["llama"], models["gemma"]
    w = [0.25, 0.75]
    mixed = ensemble(rule, "llama", "gemma", weights=w, level=level)
    context = "The baker"
    token = first.tok_encode(context + " counts")[len(first.tok_encode(context))]
    said = first.tokenizer.decode([token])
    (found,) = mixed.loglikelihood([choice(context, said)])
    one, two = (
        plain_logits(m.model, m.tok_encode(context))[-1].log_softmax(-1).double()
        for m in (first, second)
    )
    size = len(first.tokenizer)
    if rule == "mean_probability":
        images = build(second.tokenizer, first.tokenizer).toarray()
        p = w[0] * one.exp().numpy()[:size] + w[1] * (two.exp().numpy() @ images)
        expected = np.log(p[token])
    else:
        back = build(first.tokenizer, second.tokenizer).toarray()
        least = float(two.min())
        z = [
            w[0] * float(one[v]) + w[1] * (float(two[row.argmax()]) if row.any() else least)
            for v, row in enumerate(back)
        ]
        expected = z[token] - np.log(np.exp(z).sum())
    assert found[0] == pytest.approx(expected, abs=1e-4)


def test_a_vote_is_won_by_most_members_and_told_by_them(
    models: dict[str, SharedPrefixLM], ensemble: Any
) -> None:
    questions = [
        [choice(f"{q} baker", f" {a}", i) for a in ("counts", "paints", "x")]
        for i, q in enumerate(("The", "Our", "A good"))
    ]
    asked = [request for question in questions for request in question]
    alone = {name: models[name].loglikelihood(asked) for name in NAMES}
    found = ensemble("majority_vote", *NAMES).loglikelihood(asked)
    decided = 0
    for start in range(0, len(asked), 3):
        votes = [int(np.argmax([s[0] for s in alone[n][start : start + 3]])) for n in NAMES]
        winner = max(set(votes), key=votes.count)
        mine = [total for total, _ in found[start : start + 3]]
        if votes.count(winner) > 1:
            decided += 1
            assert int(np.argmax(mine)) == winner
            p = [
                np.mean(
                    [
                        np.exp(alone[n][start + c][0])
                        for n, v in zip(NAMES, votes, strict=True)
                        if v == winner
                    ]
                )
                for c in range(3)
            ]
            assert np.exp(mine) == pytest.approx(p)
    assert decided


def test_samples_of_a_mixture_are_its_own_and_repeatable(ensemble: Any) -> None:
    mixed = ensemble("mean_probability", "llama", "gemma")
    asked = [generation("The baker", do_sample=True, temperature=1.0) for _ in range(3)]
    found = mixed.generate(asked)
    assert len({made.text for made in found}) == 3
    assert mixed.generate(asked) == found
    cold = mixed.generate([generation("The baker", temperature=1e-7)])
    assert [g.text for g in cold] == [g.text for g in mixed.generate(PROMPTS[:1])]


@RULES
def test_a_prompt_beyond_a_members_context_is_cut_from_its_left(
    tiny: dict[str, Path], models: dict[str, SharedPrefixLM], maps: dict, rule: str
) -> None:
    short = SharedPrefixLM(str(tiny["gemma"]), max_length=40)
    lm = EnsembleLM([models["llama"], short], rule, {}, [maps["gemma", "llama"]])
    long = "the baker waits for the morning train and paints the garden gate " * 6
    scores = lm.loglikelihood([choice(long, " at noon"), choice(long, " with great care")])
    assert all(np.isfinite(total) for total, _ in scores)
    (made,) = lm.generate([generation(long)])
    assert made.tokens == 9 or made.finish_reason == "eos"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": [0.5, 0.6]}, "sum to 1.1; they should sum to 1"),
        ({"weights": [1.5, -0.5]}, "1.5, -0.5: each should be a number from 0 on"),
        ({"weights": [float("nan"), 1.0]}, "nan, 1: each should be"),
        ({"weights": [1.0]}, "1 for 2 members"),
        ({"level": "word"}, "'word' does not go with mean_probability; allowed: chunk, sequence"),
    ],
)
def test_wrong_weights_and_levels_are_refused(ensemble: Any, settings: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ensemble("mean_probability", "llama", "gemma", **settings)


def test_the_first_of_three_must_count_where_probabilities_of_its_tokens_are_mixed(
    ensemble: Any,
) -> None:
    names, weights = ("neox", "llama", "gemma"), [0.0, 0.5, 0.5]
    with pytest.raises(RecipeError, match="the first member's is 0, but at level token"):
        ensemble("mean_probability", *names, weights=weights, level="token")
    ensemble("mean_probability", *names, weights=weights, level="chunk")
    # As logits, every token has a value from each member.
    mixed = ensemble("mean_logit", *names, weights=weights)
    assert np.isfinite(mixed.loglikelihood([choice("The baker", "!")])[0][0])


def test_a_member_of_no_finite_probabilities_is_named_and_not_weighed(
    tiny: dict[str, Path], models: dict[str, SharedPrefixLM], maps: dict
) -> None:
    broken = SharedPrefixLM(str(tiny["gemma"]))
    broken.model.get_output_embeddings().weight.data[5] = float("nan")
    lm = EnsembleLM([models["llama"], broken], "packllm_sim", {}, [maps["gemma", "llama"]])
    with pytest.raises(RunError, match="nan bits per byte"):
        lm.loglikelihood(CHOICES[:1])
