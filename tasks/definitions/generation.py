"""What the tasks of `generation@fusellm` take for an answer, and when it is right.

An answer is one string; `[invalid]` is lm-eval's mark for none. Rules are those of the sets'
authors, as each function says.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from typing import Any

NONE = "[invalid]"
TOLERANCE = 0.05  # of SciBench's authors (2307.10635), relative

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_QUOTES = "\u2018\u2019\u00b4\u0060"  # beside ASCII's, those that TriviaQA's authors name
_ENDS = string.punctuation + _QUOTES + "\u201c\u201d\u2013\u2014\u2026"  # may close a word
_NUMBER = re.compile(
    r"(?P<value>[-\u2212]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)"
    r"(?:\s*(?:\\times|\\cdot|\*|\u00d7|x)\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<power>[-\u2212]?\d+))?"
)


def response_bits(
    doc: dict[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, tuple[float, int]]:
    """An answer's log-likelihood and its bytes."""
    return {"bits_per_byte": (results[0][0], len(doc["answer"].encode()))}


def triviaqa(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer is one of the aliases, both as TriviaQA's authors normalise them.

    Case, articles, underscores and blanks do not count; punctuation is a blank. So the published
    scorer (Joshi et al. 2017); lm-eval's stock task keeps articles, and joins what punctuation
    parts.
    """
    return {"exact_match": float(_plain(results[0]) in doc["gold"])}


def _plain(text: str) -> str:
    """TriviaQA's normal form of an answer."""
    spaced = (" " if c in _PUNCTUATION or c in _QUOTES else c for c in text.lower())
    return " ".join(_ARTICLES.sub(" ", "".join(spaced)).split())


def drop(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 of DROP's authors (Dua et al. 2019), the best over accepted answers.

        F1 of an answer of k spans = max over spans of F1(bag of words) / k

    A generation is one span, so the best pairing of spans is its best match. A span with numbers
    matches only what holds one of them; F1 is rounded to two decimals, as published.
    """
    said = _words(results[0])
    best, exact = 0.0, 0.0
    for answer in doc["gold"]:
        if not answer[0].strip():
            continue
        spans = [_words(span) for span in answer]
        exact = max(exact, float(len(spans) == 1 and spans[0] == said))
        found = max(_overlap(frozenset(said), frozenset(span)) for span in spans)
        best = max(best, round(found / len(spans), 2))
    return {"exact_match": exact, "f1": best}


def _words(text: str) -> list[str]:
    """DROP's normal form: words in small letters without articles and punctuation, 3 as 3.0."""
    out = []
    for piece in re.split(" |-", text.lower()):
        number = _value(piece) is not None
        word = piece if number else "".join(c for c in piece if c not in _PUNCTUATION)
        value = _value(word)
        out += _ARTICLES.sub(" ", word if value is None else str(value)).split()
    return out


def _value(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _overlap(said: frozenset[str], span: frozenset[str]) -> float:
    """F1 of two bags; 0 where the span has numbers and none of them was said."""
    numbers = {word for word in span if _value(word) is not None}
    if numbers and not numbers & said:
        return 0.0
    common = len(said & span)
    precision = common / len(said) if said else 1.0
    recall = common / len(span) if span else 1.0
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def first_words(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """The first word of each generation, without the punctuation behind it (LAMBADA)."""
    words = [said[0].split()[:1] for said in resps]
    return [[(word[0].rstrip(_ENDS) or NONE) if word else NONE] for word in words]


def lambada(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the word is the passage's last one, letter by letter."""
    return {"exact_match": float(results[0] == doc["gold"].rstrip(_ENDS))}


def numbers(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    r"""The number that each generation gives (SciBench): in its last \boxed, else the first one."""
    out = []
    for said in resps:
        found = _NUMBER.search(said[0].rpartition("\\boxed{")[2])
        out.append([found[0] if found else NONE])
    return out


def scibench(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the number is within 5 % of the right one, relative to the larger of the two."""
    found = _NUMBER.fullmatch(results[0])
    if not found:
        return {"acc": 0.0}
    said = found["value"].replace(",", "").replace("\u2212", "-")
    power = int((found["power"] or "0").replace("\u2212", "-"))
    value = float(said) * float(f"1e{power}")
    return {"acc": float(math.isclose(value, float(doc["gold"]), rel_tol=TOLERANCE))}
