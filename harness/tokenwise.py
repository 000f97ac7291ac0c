"""Members of an ensemble mixed token by token, in the first member's vocabulary.

The first member predicts its next token; another is heard where it stands at the same byte, so that
both predict what follows the same text. As probabilities, its tokens arrive through the prefix map
(what has no image is lost); as logits, each of the first one's tokens has the probability of the
first token by which the other would say it.

Shapes: M members, B rows, V vocabulary of the first member, U of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from fusion.models import embedding_rows
from fusion.vocabulary import build
from harness.branches import Predictions, logprobs_at

ROWS = 128  # positions whose distributions exist at the same time


class Vocabularies:
    """What further members predict, in the vocabulary of the first.

    members: with `model` and `tokenizer`. maps: csr (U, V) for each further member; a token has at
    most one image.
    """

    def __init__(self, members: Sequence[Any], maps: Sequence[sparse.csr_array], what: str) -> None:
        self.what, self.size = what, embedding_rows(members[0].model)
        self.images: list[Tensor] = []
        for member, vocabulary_map in zip(members[1:], maps, strict=True):
            rows = embedding_rows(member.model)
            if what == "logits":
                back = build(members[0].tokenizer, member.tokenizer)
                images = _images(back, self.size, rows)
            else:
                images = _images(vocabulary_map, rows, self.size)
                images = torch.where(images < 0, self.size, images)  # lost, beside the vocabulary
            self.images.append(images.to(member.model.device))

    def mix(self, logprobs: Sequence[Tensor | None], weights: Tensor) -> Tensor:
        """Log-probabilities (B, V) of the mixture.

        logprobs: (B, V) of the first and (B, U) of each further member; None for one that is
        silent in all rows. weights: (M, B), zero where a member is silent; where all others are,
        the first speaks alone, whatever it weighs.
        """
        first = logprobs[0]
        assert first is not None
        alone = weights[1:].sum(0) == 0
        weights = torch.where(alone[None], torch.eye(len(weights))[0][:, None], weights)
        weights = (weights / weights.sum(0)).to(first.device, first.dtype)
        if alone.all():
            return first
        mixed = self._logits if self.what == "logits" else self._probabilities
        out = mixed(first, logprobs[1:], weights)
        return torch.where(alone[:, None].to(out.device), first, out)

    def _probabilities(
        self, first: Tensor, others: Sequence[Tensor | None], weights: Tensor
    ) -> Tensor:
        out = first.new_zeros(len(first), self.size + 1)  # the last: what is lost
        out[:, : first.shape[1]] = first.exp() * weights[0][:, None]
        for images, other, w in zip(self.images, others, weights[1:], strict=True):
            if other is not None:
                p = other.to(first.device).exp() * w[:, None]
                out.scatter_add_(1, images.to(first.device).expand(p.shape), p)
        return out[:, : self.size].log()

    def _logits(self, first: Tensor, others: Sequence[Tensor | None], weights: Tensor) -> Tensor:
        out = first * weights[0][:, None]
        for images, other, w in zip(self.images, others, weights[1:], strict=True):
            if other is not None:
                z = other.to(first.device)
                found = z[:, images.clamp_min(0).to(z.device)]
                # What a member cannot say is as unlikely to it as its least likely token.
                lacking = (images < 0).to(z.device)
                found = torch.where(lacking, z.min(dim=1, keepdim=True).values, found)
                out = out + torch.where(w[:, None] > 0, found * w[:, None], 0.0)
        return torch.log_softmax(out, dim=-1)


def _images(vocabulary_map: sparse.csr_array, rows: int, columns: int) -> Tensor:
    """The image of each token, (rows,); -1 where it has none."""
    found = vocabulary_map.tocoo()
    out = torch.full((rows,), -1, dtype=torch.long)
    source, target = (torch.from_numpy(x.astype(np.int64)) for x in (found.row, found.col))
    known = (source < rows) & (target < columns)
    out[source[known]] = target[known]
    return out


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as one member reads it: what predicted each token, and the byte where that begins.

    places: (predictions, node) of each token; ids and starts of the tokens.
    """

    places: list[tuple[Predictions, int]]
    ids: list[int]
    starts: np.ndarray


@dataclass(frozen=True, slots=True)
class Text:
    """A text to be scored: a reading of each member, and their weights (M,)."""

    readings: Sequence[Reading]
    weights: np.ndarray


def score(vocabularies: Vocabularies, texts: Sequence[Text]) -> list[tuple[float, bool]]:
    """Log-probability of the first member's tokens under the mixture, and whether all are greedy.

    Positions of all texts go through a member's output head together, ROWS at a time.
    """
    wanted = [(n, i) for n, text in enumerate(texts) for i in range(len(text.readings[0].ids))]
    heard = [
        [_places(text, number) for text in texts] for number in range(len(vocabularies.images))
    ]
    totals, greedy = [0.0] * len(texts), [True] * len(texts)
    for begin in range(0, len(wanted), ROWS):
        rows = wanted[begin : begin + ROWS]
        logprobs: list[Tensor | None] = [
            logprobs_at([texts[n].readings[0].places[i] for n, i in rows])
        ]
        w = np.stack([texts[n].weights for n, _ in rows], axis=1)
        for number, known in enumerate(heard, 1):
            own = [known[n][i] for n, i in rows]
            w[number] *= [place is not None for place in own]
            (some,) = np.nonzero(w[number])
            logprobs.append(None)
            if len(some):
                found = logprobs_at([own[at] for at in some])  # type: ignore[misc]
                if len(some) < len(rows):
                    whole = found.new_zeros(len(rows), found.shape[1])
                    whole[torch.from_numpy(some)] = found
                    found = whole
                logprobs[-1] = found
        mixed = vocabularies.mix(logprobs, torch.from_numpy(w))
        gold = torch.tensor([texts[n].readings[0].ids[i] for n, i in rows], device=mixed.device)
        values = mixed.gather(1, gold[:, None])[:, 0].double().tolist()
        right = (mixed.argmax(1) == gold).tolist()
        for (n, _), value, best in zip(rows, values, right, strict=True):
            totals[n] += value
            greedy[n] &= best
    return list(zip(totals, greedy, strict=True))


def _places(text: Text, number: int) -> list[tuple[Predictions, int] | None]:
    """Where a further member predicts each of the first one's tokens; None where none begins."""
    first, other = text.readings[0], text.readings[number + 1]
    at = {int(start): place for start, place in zip(other.starts, other.places, strict=True)}
    return [at.get(int(start)) for start in first.starts[: len(first.ids)]]
