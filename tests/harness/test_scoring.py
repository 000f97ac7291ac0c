"""Shared-prefix scoring and batched generation against lm-eval's own transformers backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from fusion.errors import RunError
from harness.scoring import SharedPrefixLM, batches

NAMES = ("llama", "gemma", "neox")
QUESTIONS = [
    ("The baker", [" counts seven apples", " paints", " walks along the river in early spring"]),
    ("A teacher reads a long letter. Then", [" my sister", " nobody", "\n\n"]),
    ("trailing space ", ["word", "x"]),
    ("", ["nothing before", "me"]),
    ("one", [" t"]),
    ("😀 é 你", [" 好", "!"]),
]
PROMPTS = [
    "The baker counts",
    "A teacher",
    "our neighbour walks along the river before the rain. Then the old captain",
    "x",
]


def instance(kind: str, *arguments: object) -> Instance:
    return Instance(kind, {}, arguments, 0)  # type: ignore[arg-type]


def choices() -> list[Instance]:
    return [instance("loglikelihood", c, x) for c, xs in QUESTIONS for x in xs]


@pytest.fixture(scope="module", params=NAMES)
def both(request: pytest.FixtureRequest, tiny: dict[str, Path]) -> tuple[SharedPrefixLM, HFLM]:
    folder = str(tiny[request.param])
    return SharedPrefixLM(folder), HFLM(folder, dtype="float32", device="cpu", batch_size=2)


def test_choices_score_as_one_row_each_would(both: tuple[SharedPrefixLM, HFLM]) -> None:
    ours, theirs = both
    assert ours._shares, "tree attention must work for this architecture"
    for mine, other in zip(
        ours.loglikelihood(choices()), theirs.loglikelihood(choices(), True), strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]


def test_batch_composition_does_not_matter(
    both: tuple[SharedPrefixLM, HFLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = both
    one = ours.loglikelihood(choices())
    monkeypatch.setattr(ours, "batch_tokens", 7)
    monkeypatch.setattr(ours, "_shares", False)
    for a, b in zip(one, ours.loglikelihood(choices()), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4)


def test_long_prompts_are_cut_from_the_left_as_lm_eval_does(tiny: dict[str, Path]) -> None:
    folder = str(tiny["llama"])
    ours = SharedPrefixLM(folder, max_length=24)
    theirs = HFLM(folder, dtype="float32", device="cpu", batch_size=1, max_length=24)
    long = "the baker waits for the morning train and paints the garden gate " * 3
    requests = [instance("loglikelihood", long, x) for x in (" at noon", " with great care")]
    for mine, other in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests, True), strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_whole_texts_score_as_in_lm_eval_where_no_bos_is_added(
    tiny: dict[str, Path], name: str
) -> None:
    ours = SharedPrefixLM(str(tiny[name]), max_length=16)
    theirs = HFLM(str(tiny[name]), dtype="float32", device="cpu", max_length=16, batch_size=1)
    texts = [instance("loglikelihood_rolling", text * 4) for text in PROMPTS]
    mine, other = ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts, True)
    assert mine == pytest.approx(other, abs=1e-3)


def test_bos_is_context_and_never_a_thing_to_predict(tiny: dict[str, Path]) -> None:
    lm = SharedPrefixLM(str(tiny["gemma"]))
    windows = lm.windows("the baker")
    assert windows[0][0] == [lm.tokenizer.bos_token_id]
    assert lm.tokenizer.bos_token_id not in windows[0][1]


@pytest.mark.parametrize("until", [["\n"], [" ", "e"], ["never-said"]])
def test_generations_are_those_of_lm_eval(
    both: tuple[SharedPrefixLM, HFLM], until: list[str]
) -> None:
    ours, theirs = both
    arguments = {"until": until, "max_gen_toks": 12, "do_sample": False}
    requests = [instance("generate_until", prompt, dict(arguments)) for prompt in PROMPTS]
    assert [g.text for g in ours.generate(requests)] == theirs.generate_until(requests, True)


def test_finish_reasons_and_lengths(both: tuple[SharedPrefixLM, HFLM]) -> None:
    ours, _ = both
    arguments = {"until": ["never-said"], "max_gen_toks": 5}
    for generation in ours.generate([instance("generate_until", p, arguments) for p in PROMPTS]):
        assert generation.finish_reason in ("length", "eos")
        assert generation.tokens <= 5


def test_sampling_is_refused(both: tuple[SharedPrefixLM, HFLM]) -> None:
    request = instance("generate_until", "x", {"do_sample": True, "temperature": 0.8})
    with pytest.raises(RunError, match="greedily"):
        both[0].generate([request])


def test_batches_keep_to_the_budget_and_lose_nothing() -> None:
    lengths = [5, 9, 1, 30, 7, 7, 2]
    found = list(batches(lengths, 20))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 20
