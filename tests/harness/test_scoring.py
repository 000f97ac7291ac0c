"""Shared-prefix scoring and batched generation against lm-eval's own transformers backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from fusion.conversations import asking
from harness.packing import SHARED, batches, beginnings, filled
from harness.scoring import SharedPrefixLM

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


SHOTS = "".join(f"Q: who {deed}?\nA: the baker\n\n" for deed in PROMPTS * 4)


def shared_choices() -> list[Instance]:
    """Questions behind two sets of solved ones, and some behind none."""
    out = choices()
    for shots in (SHOTS, SHOTS[9:]):
        for question, answers in QUESTIONS[:2] + QUESTIONS[5:]:
            out += [instance("loglikelihood", shots + question, answer) for answer in answers]
    return out


def test_a_beginning_that_is_read_once_changes_no_score(
    both: tuple[SharedPrefixLM, HFLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = both
    for name, limit in (("batch_tokens", 4096), ("batch_tokens", 7)):
        monkeypatch.setattr(ours, name, limit)
        before = ours.forward_tokens
        found = ours.loglikelihood(shared_choices())
        read = ours.forward_tokens - before
        for mine, other in zip(found, theirs.loglikelihood(shared_choices(), True), strict=True):
            assert mine[0] == pytest.approx(other[0], abs=1e-4)
            assert mine[1] == other[1]
        # Once for each set of shots, not once for each question.
        assert read < 3 * len(ours.tok_encode(SHOTS)) + 300


def test_a_beginning_that_is_read_once_changes_no_text(both: tuple[SharedPrefixLM, HFLM]) -> None:
    ours, theirs = both
    stop = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [instance("generate_until", SHOTS + p, stop) for p in PROMPTS]
    requests += [instance("generate_until", p, stop) for p in PROMPTS]
    before = ours.forward_tokens
    assert ours.generate_until(requests) == theirs.generate_until(requests, True)
    assert ours.forward_tokens - before < 2 * len(ours.tok_encode(SHOTS)) + 300


def test_batches_keep_to_the_budget_and_lose_nothing() -> None:
    lengths = [5, 9, 1, 30, 7, 7, 2]
    found = list(batches(lengths, 20))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 20


CONTEXTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12
)


@given(CONTEXTS)
def test_what_begins_alike_is_found_and_nothing_is_lost(made: list[tuple[int, int, int]]) -> None:
    contexts = [
        [task] * 100 + [shots] * (SHARED + 10 * task) + [7 + n] * n for task, shots, n in made
    ]
    groups, rest = beginnings(contexts)
    assert sorted([*rest, *(i for _, members in groups for i in members)]) == list(
        range(len(contexts))
    )
    for length, members in groups:
        assert len(members) > 1
        assert length >= SHARED
        assert len({tuple(contexts[i][:length]) for i in members}) == 1
        assert all(length < len(contexts[i]) for i in members)
    for index in rest:
        assert not any(
            contexts[index][:150] == other[:150]
            for number, other in enumerate(contexts)
            if number != index and min(len(other), len(contexts[index])) > 150
        )


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 20))
def test_packs_are_filled_in_order(sizes: list[int], most: int) -> None:
    packs = list(filled(sizes, most))
    assert [i for pack in packs for i in pack] == list(range(len(sizes)))
    assert all(len(pack) == 1 or sum(sizes[i] for i in pack) <= most for pack in packs)


def test_an_answer_ends_where_the_template_closes_it_and_a_text_only_at_its_end(
    tiny: dict[str, Path],
) -> None:
    lm = SharedPrefixLM(str(tiny["llama"]), device="cpu")
    lm.tokenizer.chat_template = str(lm.tokenizer.chat_template).replace("<|end|>", "<|other|>")
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<|other|>"]})
    other = lm.tokenizer.get_vocab()["<|other|>"]
    ends = {
        prompt: lm._asked(instance("generate_until", prompt, {}))[1].ends
        for prompt in (asking([("user", "Who?")]), "Who?")
    }
    assert list(ends.values()) == [{lm.eot_token_id, other}, {lm.eot_token_id}]
