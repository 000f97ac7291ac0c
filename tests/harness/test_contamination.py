"""Runs of words that questions share with a corpus, against a scalar search."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.contamination import overlap

SENTENCE = "The quick brown fox jumps over the lazy dog and then it sleeps all day long"  # 16 words


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_not() -> None:
    words = SENTENCE.split()
    for n, found in ((13, 1), (12, 0)):
        corpus = ["Nothing here. " + " ".join(words[:n]) + " ... and something else"]
        assert overlap([SENTENCE], corpus)["found"] == found


def test_case_punctuation_and_line_breaks_do_not_hide_a_copy() -> None:
    corpus = [SENTENCE.upper().replace(" ", ",\n-- ")]
    assert overlap([SENTENCE], corpus)["found"] == 1
    assert overlap(["Überall sind " + SENTENCE], ["ÜBERALL SIND " + SENTENCE])["found"] == 1


def test_a_run_does_not_go_from_one_text_into_the_next() -> None:
    words = SENTENCE.split()
    corpus = [" ".join(words[:8]), " ".join(words[8:])]
    assert overlap([SENTENCE], corpus)["found"] == 0


def test_a_short_question_cannot_tell_and_is_counted_as_such() -> None:
    counts = overlap(["Is it so?", SENTENCE, ""], [SENTENCE, "Is it so?"])
    assert counts == {"items": 3, "short": 2, "found": 1, "corpus_words": 19, "n": 13}


@pytest.mark.parametrize("corpus", [[], [""], ["a b c"]])
def test_nothing_to_read_is_no_overlap(corpus: list[str]) -> None:
    assert overlap([SENTENCE], corpus)["found"] == 0
    assert overlap([], corpus)["items"] == 0


TEXTS = st.lists(st.text("abc ,A", max_size=30), max_size=5)


@given(questions=TEXTS, corpus=TEXTS, n=st.integers(1, 4))
def test_counts_are_those_of_a_search_word_by_word(
    questions: list[str], corpus: list[str], n: int
) -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.sub(r"[^a-z]+", " ", text.lower()).split()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    known = set().union(*map(runs, corpus)) if corpus else set()
    counts = overlap(questions, corpus, n)
    assert counts["found"] == sum(bool(runs(q) & known) for q in questions)
    assert counts["short"] == sum(not runs(q) for q in questions)
