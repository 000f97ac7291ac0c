"""How a text goes on: which token comes next, greedy or drawn, and where the text ends.

A draw is a function of the seed, the prompt's text, the sample's number and the step alone, so that
what is generated beside it, and in which order, changes nothing.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion.errors import RunError
from fusion.models import logits
from harness.caching import GrowingCache


@dataclass(frozen=True, slots=True)
class Generation:
    """Generated text, cut at the stop string; why it ended (stop, eos, length); tokens made."""

    text: str
    finish_reason: str
    tokens: int


class Stopper:
    """Where a growing text ends: at an end token, a stop string, or after `most` tokens."""

    def __init__(self, tokenizer: Any, until: Sequence[str], ends: set[int], most: int) -> None:
        self.tokenizer, self.until, self.ends, self.most = tokenizer, list(until), ends, most
        self.tail = max((len(stop) for stop in self.until), default=0) + 8

    def check(self, ids: list[int]) -> Generation | None:
        """The finished generation, or None to go on."""
        if ids[-1] in self.ends:
            return Generation(self._text(ids[:-1]), "eos", len(ids))
        # A stop string can only have ended in the last few tokens, each at least one character.
        recent = self._text(ids[-self.tail :])
        if any(stop in recent for stop in self.until):
            text = self._text(ids)
            found = [at for stop in self.until if (at := text.find(stop)) >= 0]
            if found:
                return Generation(text[: min(found)], "stop", len(ids))
        if len(ids) >= self.most:
            return Generation(self._text(ids), "length", len(ids))
        return None

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Draws from softmax(logits / temperature), cut to the likeliest tokens.

    top_k: how many, 0 for all. top_p: of these the fewest whose share is at least this. key: 128
    bits of the seed, the prompt and the sample's number; the step counts beside it (Philox).
    Temperature, top_k and top_p apply in this order, as in transformers.
    """

    temperature: float
    top_p: float
    top_k: int
    key: int

    def pick(self, logits_V: np.ndarray, step: int) -> int:
        """The token whose stretch of the distribution, in order of ids, the step's draw hits."""
        z = logits_V.astype(np.float64)
        # The largest is taken away first: a temperature near 0 would overflow.
        p = np.exp((z - z.max()) / self.temperature)
        if self.top_k or self.top_p < 1:
            order = np.argsort(-p, kind="stable")
            kept = order[: self.top_k or None]
            mass = p[kept].cumsum()
            few = int(np.searchsorted(mass, self.top_p * mass[-1], side="left")) + 1
            mask = np.zeros(len(p), dtype=bool)
            mask[kept[:few]] = True
            p = np.where(mask, p, 0.0)
        # In order of ids, not of likelihood: rounding that swaps two neighbours changes no draw.
        mass = p.cumsum()
        raw = int(np.random.Philox(key=self.key, counter=step).random_raw())
        hit = np.searchsorted(mass, (raw >> 11) * 2.0**-53 * mass[-1], side="right")
        return int(min(hit, p.nonzero()[0][-1]))


def sampling(arguments: dict[str, Any], seed: int, prompt: str, number: int) -> Sampling | None:
    """How a request asks to be drawn from; None for greedy, which is also temperature 0.

    As in lm-eval, a temperature above 0 without `do_sample` asks for sampling, too. Raises RunError
    if a value is out of range.
    """
    temperature = float(arguments.get("temperature", 1.0 if arguments.get("do_sample") else 0.0))
    top_p, top_k = float(arguments.get("top_p", 1.0)), int(arguments.get("top_k") or 0)
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1 or top_k < 0:
        raise RunError(
            f"generation asks for temperature {temperature:g}, top_p {top_p:g}, top_k {top_k}; "
            "allowed: temperature from 0, top_p above 0 up to 1, top_k from 0 (which is all)"
        )
    if not temperature or arguments.get("do_sample", True) is False:
        return None
    named = f"{seed}\n{number}\n{prompt}".encode()
    key = int.from_bytes(hashlib.blake2b(named, digest_size=16).digest(), "little")
    return Sampling(temperature, top_p, top_k, key)


@dataclass(frozen=True, slots=True)
class Begun:
    """A prompt's ids, the rule by which its text stops, and how tokens are drawn, if they are."""

    ids: list[int]
    stopper: Stopper
    drawn: Sampling | None = None


def next_tokens(logits_BV: Tensor, rows: Sequence[Begun], step: int) -> list[int]:
    """Each row's next token: the likeliest, or the one drawn at this step."""
    best = logits_BV.argmax(-1).tolist()
    for number, row in enumerate(rows):
        if row.drawn:
            best[number] = row.drawn.pick(logits_BV[number].float().cpu().numpy(), step)
    return best


def together(
    model: Any, rows: Sequence[Begun], cache: GrowingCache, read: int
) -> tuple[list[Generation], int]:
    """Generations after the `read` tokens of every row that the cache holds, and tokens read.

    Rows leave the batch when they stop.
    """
    out: dict[int, Generation] = {}
    alive = list(range(len(rows)))
    made: list[list[int]] = [[] for _ in rows]
    feed = [row.ids[read:] for row in rows]
    count = 0
    with torch.inference_mode():
        while alive:
            count += sum(map(len, feed))
            scores = logits(model, cache.feed(feed)[:, -1])
            step = len(made[alive[0]])
            best = next_tokens(scores, [rows[row] for row in alive], step)
            going = []
            for slot, (row, token) in enumerate(zip(alive, best, strict=True)):
                made[row].append(token)
                finished = rows[row].stopper.check(made[row])
                if finished:
                    out[row] = finished
                else:
                    going.append(slot)
            if going and len(going) < len(alive):
                cache.keep(torch.tensor(going, device=model.device))
            alive = [alive[slot] for slot in going]
            feed = [[made[row][-1]] for row in alive]
    return [out[row] for row in range(len(rows))], count


def of_one_length(rows: Sequence[Begun], most: int) -> Iterator[list[int]]:
    """Indices of prompts of equal length, longest first, at most `most` together."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row.ids), []).append(index)
    for _, members in sorted(by_length.items(), reverse=True):
        for start in range(0, len(members), most):
            yield members[start : start + most]


def plainly(model: Any, rows: Sequence[Begun]) -> tuple[list[Generation], int]:
    """The same by transformers' own `generate`, for rows of one length: no padding, no pattern."""
    from transformers import GenerationConfig

    start = len(rows[0].ids)
    out: dict[int, Generation] = {}

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        best = next_tokens(scores, rows, ids.shape[1] - start)
        forced = torch.full_like(scores, float("-inf"))
        forced[torch.arange(len(best)), best] = 0.0
        return forced

    def stop(ids: Tensor, _: Any, **__: Any) -> Tensor:
        for number, row in enumerate(rows):
            finished = None if number in out else row.stopper.check(ids[number, start:].tolist())
            if finished:
                out[number] = finished
        return torch.tensor([n in out for n in range(len(rows))], device=ids.device)

    ids = torch.tensor([row.ids for row in rows], device=model.device)
    most = max(row.stopper.most for row in rows)
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=most, do_sample=False, pad_token_id=0, eos_token_id=None
            ),
            logits_processor=[choose],
            stopping_criteria=[stop],
        )
    made = [out[number] for number in range(len(rows))]
    return made, sum(start + generation.tokens for generation in made)
