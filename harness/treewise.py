"""Texts scored under a mixture by token or by byte: a question's choices in one row of each member.

Every function takes an ensemble's members and gives (log-probability, greedy) of each continuation.

Shapes: M members.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fusion.tokens import tokenize
from harness.branches import Branches, predict
from harness.bytewise import Covering, mix_bytes, score_bytes
from harness.scoring import Pair, SharedPrefixLM
from harness.tokenwise import Reading, Text, Vocabularies, score

SEGMENT = 256  # bytes of a text without a prompt that are scored in one tree
Asked = Sequence[tuple[str, Sequence[str]]]  # contexts with their continuations
Scores = list[tuple[float, bool]]


def by_token(
    members: Sequence[SharedPrefixLM],
    vocabularies: Vocabularies,
    asked: Asked,
    pairs: Sequence[Sequence[Sequence[Pair]]],
    weights: Sequence[np.ndarray],
) -> Iterator[Scores]:
    """Mixed token by token of the first member's vocabulary.

    pairs: member, context, continuation. weights: (M,) for each context.
    """
    readings = [_readings(member, asked, own) for member, own in zip(members, pairs, strict=True)]
    texts = [
        Text([own[number][at] for own in readings], weights[number])
        for number, (_, choices) in enumerate(asked)
        for at in range(len(choices))
    ]
    scores = iter(score(vocabularies, texts))
    for _, choices in asked:
        yield [next(scores) for _ in choices]


def _readings(
    member: SharedPrefixLM, asked: Asked, pairs: Sequence[Sequence[Pair]]
) -> list[list[Reading]]:
    trees = [Branches(some[0][0]) for some in pairs]
    paths = [
        [[0, *tree.path(ids[:-1])] for _, ids in some]
        for tree, some in zip(trees, pairs, strict=True)
    ]
    out = []
    for (context, texts), some, own, found in zip(
        asked, pairs, paths, predict(member, trees), strict=True
    ):
        out.append(
            [
                Reading(
                    [(found, node) for node in path],
                    ids,
                    _starts(member, context + text, len(ids)),
                )
                for text, (_, ids), path in zip(texts, some, own, strict=True)
            ]
        )
    return out


def _starts(member: SharedPrefixLM, text: str, count: int) -> np.ndarray:
    """The bytes where a text's last tokens begin."""
    ends = tokenize(member.tokenizer, text).ends
    missing = max(1, count + 1 - len(ends))
    return np.concatenate([np.zeros(missing, np.int64), ends])[-count - 1 : -1]


def rolling_by_token(
    members: Sequence[SharedPrefixLM],
    vocabularies: Vocabularies,
    text: str,
    weights: np.ndarray,
    rule: Mapping[str, int] | None = None,
) -> float:
    """A whole text, each member in its windows by `rule` (`rolling.sliding`)."""
    readings = []
    for member in members:
        windows = member.windows(text, rule)
        trees = [Branches(context) for context, _ in windows]
        paths = [[0, *tree.path(ids[:-1])] for tree, (_, ids) in zip(trees, windows, strict=True)]
        places = [
            (found, node)
            for found, path in zip(predict(member, trees), paths, strict=True)
            for node in path
        ]
        ids = [token for _, tokens in windows for token in tokens]
        readings.append(Reading(places, ids, _starts(member, text, len(ids))))
    return score(vocabularies, [Text(readings, weights)])[0][0]


def spreads(
    members: Sequence[SharedPrefixLM], asked: Asked
) -> Iterator[tuple[tuple[np.ndarray, ...], ...]]:
    """For each context, for each continuation: next-byte probabilities of each member."""
    covers = [[Covering(member, *one) for one in asked] for member in members]
    found = [
        predict(member, [cover.tree for cover in own])
        for member, own in zip(members, covers, strict=True)
    ]
    for number in range(len(asked)):
        own = [c[number].spread(said[number]) for c, said in zip(covers, found, strict=True)]
        yield tuple(zip(*own, strict=True))


def by_byte(
    members: Sequence[SharedPrefixLM], asked: Asked, weights: Sequence[np.ndarray]
) -> Iterator[Scores]:
    """Mixed byte by byte. weights: (M,) for each context."""
    for (_, texts), found, w in zip(asked, spreads(members, asked), weights, strict=True):
        yield [
            score_bytes(mix_bytes(own, w), text.encode())
            for text, own in zip(texts, found, strict=True)
        ]


def rolling_by_byte(
    members: Sequence[SharedPrefixLM],
    text: str,
    weights: np.ndarray,
    rule: Mapping[str, int] | None = None,
) -> float:
    """A whole text, each segment after what is before it in its window and fits a member's context.

    rule: windows in bytes as in `rolling.sliding`, a character that crosses a border belonging to
    the later one; without a rule a segment stands behind the whole text before it.
    """
    asked = [(text[first:start], [text[start:end]]) for first, start, end in segments(text, rule)]
    each = [weights] * len(asked)
    return sum(scores[0][0] for scores in by_byte(members, asked, each))


def segments(text: str, rule: Mapping[str, int] | None) -> list[tuple[int, int, int]]:
    """Where the context, the segment and what follows it begin: the text, once, in characters."""
    ends = np.cumsum([len(character.encode()) for character in text])
    border = rule["window"] if rule else int(ends[-1]) if len(ends) else 0
    out, first, start = [], 0, 0
    for at, end in enumerate(ends):
        if rule and end > border:
            if at > start:
                out.append((first, start, at))
            start = at
            while end > border:
                border += rule["stride"]
            first = int(np.searchsorted(ends, border - rule["window"], side="left")) + 1
        if end - (ends[start - 1] if start else 0) >= SEGMENT or at + 1 == len(ends):
            out.append((first, start, at + 1))
            start = at + 1
    return out
