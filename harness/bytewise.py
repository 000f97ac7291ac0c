r"""The probability of the next byte under a model of tokens, and mixtures of it.

A text's bytes s are covered by a stem (tokens that spell its first bytes) and one more token that
begins with the rest. The probability of the next byte b is the share of what covers s and goes on
with b:

    P(b | s) = N(s + b) / Z(s)      N(s) = Σ_n P(n) Σ_{v: bytes(v) begins with s after n} P(v | n)
    Z(s) = Σ_b N(s + b) + P(s) P(end | s)

over stems n. A stem is the tokenizer's own cut of the text up to a whole character, or a beginning
of one; inside a character, every token that ends there. So stems depend on s alone, all bytes and
the end sum to one at every position, and bytes are the same for all tokenizers: members are mixed
without a map. Sound for tokenizers whose tokens spell the text; a member that has no stem for what
was read is silent from there on.

Of one model, log P(text | context) by bytes is the log-probability of all that covers context and
text less that of all that covers the context. The sum over its tokens is of one cut of each alone:
of the terms of the first, the cut that ends where the text does. Neither bounds the other, but
after an empty context, where the second is zero.

At the very start of a text a tokenizer that puts a space in front reads "x" and " x" alike; which
of them is read there is taken from the text.

*Relative to* a sum over all cuts of the text: stems that the tokenizer itself would never make are
left out; there are exponentially many, and models hardly find them likely.

Shapes: M members, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fusion.tokens import token_bytes, tokenize
from harness.branches import Branches, Predictions
from harness.scoring import SharedPrefixLM

END = 256  # the index of the text's end, after the 256 bytes
ROWS = 32  # stems whose predictions exist at the same time
KEPT = 100_000  # beginnings whose neighbours are remembered
Cut = tuple[list[int], np.ndarray, int]  # ids, byte ends of the text's tokens, bytes read


class Spellings:
    """A vocabulary in the order of its tokens' bytes: those that begin alike are neighbours."""

    def __init__(self, tokenizer: Any) -> None:
        table = token_bytes(tokenizer)
        self.order = sorted((i for i, b in enumerate(table) if b), key=lambda i: table[i] or b"")
        self.bytes: list[bytes] = [table[i] or b"" for i in self.order]
        self.longest = max(map(len, self.bytes), default=0)
        self.known: dict[bytes, tuple[np.ndarray, np.ndarray, int]] = {}

    def following(self, begun: bytes) -> tuple[np.ndarray, np.ndarray, int]:
        """The tokens that begin so and go on, by their next byte.

        (where each group starts in `order`, its byte, where the last one stops).
        """
        found = self.known.get(begun)
        if found is None:
            at, groups, values = bisect_right(self.bytes, begun), [], []
            while at < len(self.bytes) and self.bytes[at].startswith(begun):
                byte = self.bytes[at][len(begun)]
                groups.append(at)
                values.append(byte)
                after = begun + bytes([byte])
                while at < len(self.bytes) and self.bytes[at].startswith(after):
                    # Far at a time: the tokens that begin so end before the next greater bytes.
                    last = byte == 255
                    at = at + 1 if last else bisect_left(self.bytes, begun + bytes([byte + 1]), at)
            found = np.array(groups, dtype=np.int64), np.array(values, dtype=np.int64), at
            if len(self.known) >= KEPT:
                self.known.clear()
            self.known[begun] = found
        return found

    def equal(self, spelled: bytes) -> list[int]:
        """The ids of the tokens that are these bytes."""
        low, high = bisect_left(self.bytes, spelled), bisect_right(self.bytes, spelled)
        return self.order[low:high]


_SPELLINGS: WeakKeyDictionary[Any, Spellings] = WeakKeyDictionary()


def spellings(tokenizer: Any) -> Spellings:
    """A tokenizer's vocabulary by bytes, made once."""
    if tokenizer not in _SPELLINGS:
        _SPELLINGS[tokenizer] = Spellings(tokenizer)
    return _SPELLINGS[tokenizer]


@dataclass
class Stems:
    """The stems of one text in a tree: node, where it ends, and from which byte on it counts.

    leads: what the tokenizer puts in front of the text's first byte, for the stem of no tokens.
    """

    text: bytes
    ends: dict[int, int] = field(default_factory=dict)
    born: dict[int, int] = field(default_factory=dict)
    leads: dict[int, bytes] = field(default_factory=dict)

    def add(self, node: int, end: int, at: int) -> None:
        """A stem that is known once `at` bytes are read."""
        self.ends[node] = end
        self.born[node] = min(at, self.born.get(node, at))

    def rest(self, node: int, at: int) -> bytes:
        """What a token after this stem has to begin with, to cover the first `at` bytes."""
        return self.leads.get(node, b"") + self.text[self.ends[node] : at]


class Covering:
    """One member's tree of stems for continuations of one context.

    `tree` is what the model has to read (`branches.predict`), from which `spread` sums.
    """

    def __init__(self, member: SharedPrefixLM, context: str, continuations: Sequence[str]) -> None:
        self.member, self.vocabulary = member, spellings(member.tokenizer)
        self.context, self.start = context, len(context.encode())
        ids = tokenize(member.tokenizer, context).ids.tolist()
        front = member.tok_encode(context) if context else [member.prefix_token_id]
        self.front = front[: len(front) - len(ids)]  # what the tokenizer itself puts before a text
        before = list(self._cuts(context, self._straddled()))
        cuts = [[*before, *self._cuts(context + t, self._inner(t))] for t in continuations]
        if before and before[0][0]:  # without BOS nothing predicts another first token
            first = before[0][0][0]
            cuts = [[cut for cut in found if cut[0][0] == first] for found in cuts]
        known = [cut[0] for found in cuts for cut in found]
        self.shared = _common(known)
        self.tree = Branches(known[0][: self.shared] if known else [member.prefix_token_id])
        self.stems = [
            self._stems(context + t, found) for t, found in zip(continuations, cuts, strict=True)
        ]

    def _straddled(self) -> list[tuple[int, int]]:
        """(characters, bytes) of the context up to its end, and to where a token may begin that
        goes beyond its end."""
        out = [(len(self.context), self.start)]
        read, raw = self.start, self.context.encode()
        for number in range(len(self.context) - 1, -1, -1):
            read -= len(self.context[number].encode())
            if self.start - read > self.vocabulary.longest:
                break
            if len(self.vocabulary.following(raw[read:])[0]):
                out.append((number, read))
        return out

    def _inner(self, text: str) -> list[tuple[int, int]]:
        """(characters, bytes) of the whole text up to each character inside a continuation."""
        out, read = [], self.start
        for number in range(1, len(text)):
            read += len(text[number - 1].encode())
            out.append((len(self.context) + number, read))
        return out

    def _cuts(self, whole: str, positions: Sequence[tuple[int, int]]) -> Iterator[Cut]:
        """The tokenizer's own cuts of a text up to these positions, where it has one."""
        for number, read in positions:
            tokens = tokenize(self.member.tokenizer, whole[:number])
            ids = self.front + tokens.ids.tolist()
            if ids and (int(tokens.ends[-1]) if len(tokens.ends) else 0) == read:
                yield ids, tokens.ends, read

    def _stems(self, whole: str, cuts: Sequence[Cut]) -> Stems:
        out = Stems(whole.encode())
        for ids, ends, read in cuts:
            nodes = [0, *self.tree.path(ids[self.shared :])]
            for number, node in enumerate(nodes):
                own = self.shared + number - len(self.front)  # tokens of the text in this stem
                if own >= 0:
                    out.add(node, int(ends[own - 1]) if own else 0, read)
                if own == 0:
                    out.leads[node] = self._lead(whole)
        self._inside(out)
        return out

    def _lead(self, whole: str) -> bytes:
        first = tokenize(self.member.tokenizer, "a").ids
        spelled = token_bytes(self.member.tokenizer)[first[0]] if len(first) else None
        dummy = spelled is not None and spelled.startswith(b" ") and not whole.startswith(" ")
        return b" " if dummy else b""

    def _inside(self, stems: Stems) -> None:
        """Stems that end inside a character: every token that ends there."""
        for at in range(self.start + 1, len(stems.text)):
            if stems.text[at] & 0xC0 != 0x80:
                continue
            for node in [n for n in stems.ends if stems.born[n] < at and stems.ends[n] < at]:
                for token in self.vocabulary.equal(stems.rest(node, at)):
                    stems.add(self.tree.grow(node, token), at, at)

    def spread(self, predictions: Predictions) -> list[np.ndarray]:
        """Probabilities (bytes + 1, 257) of the next byte, or the end, for each continuation.

        Row i is what follows its first i bytes; the last row is only right for an empty one, whose
        end has its stems. A row of zeros: the member is silent there.
        """
        count = len(self.tree.tokens)
        order = torch.tensor(self.vocabulary.order, device=self.member.model.device)
        reached = np.zeros(count)  # log-probability of each stem after the root
        sums = [np.zeros((len(s.text) - self.start + 1, END + 1)) for s in self.stems]
        scales = [np.full(len(found), -np.inf) for found in sums]
        for begin in range(0, count, ROWS):
            nodes = range(begin, min(begin + ROWS, count))
            rows = predictions.logprobs(nodes)
            for child in range(max(1, begin), count):
                parent = self.tree.parents[child]
                if parent in nodes:
                    own = float(rows[parent - begin, self.tree.tokens[child]])
                    reached[child] = reached[parent] + own
            p = rows.index_select(1, order.to(rows.device)).exp().cpu().numpy().astype(np.float64)
            end = rows[:, self.member.eot_token_id].exp().cpu().numpy().astype(np.float64)
            for stems, found, scale in zip(self.stems, sums, scales, strict=True):
                for node in nodes:
                    if node in stems.ends:
                        self._add(
                            stems,
                            node,
                            p[node - begin],
                            end[node - begin],
                            found,
                            scale,
                            reached[node],
                        )
        totals = [found.sum(axis=1, keepdims=True) for found in sums]
        return [f / np.where(t > 0, t, 1.0) for f, t in zip(sums, totals, strict=True)]

    def _add(
        self,
        stems: Stems,
        node: int,
        p: np.ndarray,
        end: float,
        sums: np.ndarray,
        scales: np.ndarray,
        reached: float,
    ) -> None:
        """What follows one stem, at every byte where it counts; scaled, as texts may be long."""
        for at in range(max(self.start, stems.born[node], stems.ends[node]), len(stems.text) + 1):
            groups, values, stop = self.vocabulary.following(stems.rest(node, at))
            ending = stems.ends[node] == at
            if not len(groups) and not ending:
                return
            row = at - self.start
            if reached > scales[row]:
                sums[row] *= np.exp(scales[row] - reached)
                scales[row] = reached
            share = np.exp(reached - scales[row])
            if len(groups):
                sums[row, values] += share * np.add.reduceat(p[:stop], groups)
            if ending:
                sums[row, END] += share * end


def _common(known: Sequence[list[int]]) -> int:
    """How many tokens all begin with in common."""
    if not known:
        return 0
    low, high = min(known), max(known)
    same = 0
    while same < min(len(low), len(high)) and low[same] == high[same]:
        same += 1
    return same


def mix_bytes(spreads: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Probabilities (bytes, 257) of the mixture; members that are silent leave theirs to others.

    Where all are silent, every byte and the end are as likely as each other.
    """
    stacked = np.stack(spreads)
    heard = stacked.sum(axis=2) > 0
    w = weights[:, None] * heard
    total = w.sum(axis=0)
    mixed = np.einsum("mb,mbv->bv", w / np.where(total > 0, total, 1.0), stacked)
    mixed[total == 0] = 1 / (END + 1)
    return mixed


def score_bytes(mixed: np.ndarray, text: bytes) -> tuple[float, bool]:
    """Log-probability of these bytes, and whether each is the likeliest."""
    values = np.frombuffer(text, dtype=np.uint8)
    p = mixed[np.arange(len(values)), values]
    with np.errstate(divide="ignore"):
        return float(np.log(p).sum()), bool((mixed[: len(values)].argmax(axis=1) == values).all())
