"""A whole text under a model: windows that slide over it, so that every token counts once.

Where windows lie is said in bytes, so that models with different tokenizers predict the same
stretches of a text behind the same text. Without such a rule windows are those of lm-eval: disjoint
and as long as the model's context.

Shapes: T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.errors import RunError
from fusion.tokens import tokenize

if TYPE_CHECKING:
    from harness.scoring import Instance

Pair = tuple[list[int], list[int]]  # context ids, predicted ids


@dataclass(frozen=True, slots=True)
class Rolled:
    """A text's log-probability, nats, and its tokens; None where no one tokenizer cut it."""

    logprob: float
    tokens: int | None


def windows(
    tokenizer: Any,
    ids: list[int],
    text: str,
    prefix: int,
    most: int,
    rule: Mapping[str, int] | None,
) -> list[Pair]:
    """Context and predicted ids of a text's windows; what is predicted is the text, once.

    prefix: the token before the text. most: tokens that the model can read. rule: see `sliding`;
    without one, lm-eval's disjoint windows of `most` tokens.
    """
    if rule is None:
        return _parts([prefix, *ids], 0, 0, len(ids), most, most)
    return sliding(ids, tokenize(tokenizer, text).ends, prefix, most, **rule)


def sliding(
    ids: list[int], ends: np.ndarray, prefix: int, most: int, window: int, stride: int
) -> list[Pair]:
    """Windows of `window` bytes, each `stride` bytes further than the one before.

    ids, ends (T,): tokens and their cumulative byte ends. The first window predicts all its tokens,
    a later one those that end in its last `stride` bytes, so that they stand behind window − stride
    bytes and more, less a token. A model whose context `most` is shorter than a window predicts it
    in parts of half its context, behind as much of the window as it can read. ValueError unless
    0 < 2·stride ≤ window, which gives every byte at least `stride` bytes of context.
    """
    if not 0 < 2 * stride <= window:
        raise ValueError(f"window {window}, stride {stride}; allowed: 0 < 2·stride ≤ window")
    if not ids:
        return []
    stream = [prefix, *ids]
    begins = np.concatenate([[0], ends[:-1]])
    out: list[Pair] = []
    done, border, last = 0, window, int(ends[-1])
    while done < len(ids):
        stop = int(np.searchsorted(ends, min(border, last), side="right"))
        first = int(np.searchsorted(begins, border - window, side="left")) if done else 0
        # Where tokens have no width, the search may point behind what is to be predicted.
        first = min(first, done)
        first = first + 1 if first else 0  # from tokens to the stream, whose first is the prefix
        whole = stop - first <= most
        out += _parts(stream, first, done, stop, most, stop - done if whole else most // 2)
        done, border = max(done, stop), border + stride
    return out


def _parts(stream: list[int], first: int, done: int, stop: int, most: int, step: int) -> list[Pair]:
    """The text's tokens `done` to `stop`, `step` at once, behind what the model can read of it."""
    out = []
    for start in range(done, stop, max(1, step)):
        end = min(start + max(1, step), stop)
        context = stream[max(first, end - most) : start + 1]
        out.append((context, stream[start + 1 : end + 1]))
    return out


def joined(found: Sequence[Sequence[Pair]], scored: Sequence[Any]) -> list[Rolled]:
    """Texts from their windows (`found`) and these windows' scores, one after the other."""
    each = iter(scored)
    return [
        Rolled(sum(next(each).total for _ in pairs), sum(len(ids) for _, ids in pairs))
        for pairs in found
    ]


def roll(lm: Any, requests: Sequence[Instance]) -> list[Rolled]:
    """Each text's log-probability and tokens.

    A model of lm-eval's own has windows of its own; RunError for a text that our rule would cut.
    """
    if hasattr(lm, "rolling"):
        return lm.rolling(requests)
    plain = []
    for request in requests:
        text, *rule = request.args
        if rule and len(text.encode()) > rule[0]["window"]:
            raise RunError(
                f"{request.task_name}: a text of {len(text.encode())} bytes, longer than a window "
                f"of {rule[0]['window']}; {type(lm).__name__} cuts windows of its own, and the "
                "numbers would not compare"
            )
        plain.append(replace(request, arguments=(text,)))
    return [Rolled(float(total), None) for total in lm.loglikelihood_rolling(plain)]
