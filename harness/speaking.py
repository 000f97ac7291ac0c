"""An ensemble's text, token by token in the first member's vocabulary.

After every token each other member re-reads the text's end and takes back from its cache what it
would now cut differently; where the text ends inside a character, it is silent.

Shapes: M members, B rows, V vocabulary of the first member, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fusion.conversations import CHAT
from fusion.models import logits, token_logprobs
from harness.caching import GrowingCache
from harness.generation import Begun, Generation, next_tokens

if TYPE_CHECKING:
    from harness.ensembles import EnsembleLM


class Speaking:
    """One batch of rows that generate together: what each member has read, and the weights."""

    def __init__(
        self, ensemble: EnsembleLM, contexts: Sequence[str], rows: Sequence[Begun]
    ) -> None:
        self.ensemble, self.contexts, self.rows = ensemble, list(contexts), list(rows)
        self.alive = list(range(len(rows)))
        self.made: list[list[int]] = [[] for _ in rows]
        self.caches = [GrowingCache(member.model, len(rows)) for member in ensemble.members]
        self.weights = np.zeros((len(ensemble.members), len(rows)))
        self.read: list[list[list[int]]] = []  # member, row: ids in its cache
        self.skipped: list[list[int]] = []  # member, row: ids cut from the left of the prompt
        # member, row: the prompt as text, and whether the member's chat template wrote it
        self.prompts = [[m.reads(context) for context in self.contexts] for m in ensemble.members]
        for member in ensemble.members:
            room = max(1, member.max_length - max(row.stopper.most for row in rows))
            whole = [member.tok_encode(context) for context in self.contexts]
            self.skipped.append([max(0, len(ids) - room) for ids in whole])
            self.read.append([ids[-room:] for ids in whole])

    def run(self) -> list[Generation]:
        """Generate until every row has stopped."""
        out: dict[int, Generation] = {}
        last = self._prefill()
        heard = np.ones((len(self.caches), len(self.alive)), dtype=bool)
        while True:
            going = []
            chosen = self._choose(last, heard)
            for slot, (row, token) in enumerate(zip(self.alive, chosen, strict=True)):
                self.made[row].append(token)
                finished = self.rows[row].stopper.check(self.made[row])
                if finished:
                    out[row] = finished
                else:
                    going.append(slot)
            if not going:
                return [out[row] for row in range(len(self.contexts))]
            if len(going) < len(self.alive):
                for cache in self.caches:
                    cache.keep(torch.tensor(going, device=cache.valid.device))
                self.weights = self.weights[:, going]
                self.alive = [self.alive[slot] for slot in going]
            last, heard = self._advance()

    def _prefill(self) -> list[Tensor | None]:
        """Read the prompts; weigh the members by how likely each found them."""
        last: list[Tensor | None] = []
        found: list[list[np.ndarray]] = []
        # Of conversations the members' prompts are unlike: weighed by their words (`heard`).
        talks = any(context.startswith(CHAT) for context in self.contexts)
        reads = self.ensemble.weigh.reads_prompt and not talks
        for member, cache, ids in zip(self.ensemble.members, self.caches, self.read, strict=True):
            hidden = cache.feed(ids)
            member.forward_tokens += sum(map(len, ids))
            width = hidden.shape[1]
            own = []
            for row, tokens in enumerate(ids if reads else ()):
                states, logprobs = hidden[row, width - len(tokens) : -1], np.zeros(0)
                if len(states):
                    gold = torch.tensor(tokens[1:], device=states.device)
                    logprobs = token_logprobs(member.model, states, gold)[0].double().cpu().numpy()
                own.append(logprobs)
            found.append(own)
            last.append(hidden[:, -1])
        if talks:
            weights = self.ensemble.heard(self.contexts)
        else:
            weights = [
                self.ensemble.weights(context, [own[row] for own in found] if reads else [])
                for row, context in enumerate(self.contexts)
            ]
        self.weights = np.stack(weights, axis=1)
        return last

    def _choose(self, last: Sequence[Tensor | None], heard: np.ndarray) -> list[int]:
        """The mixture's next token for each row; members that lag behind are left out."""
        weights = self.weights * heard
        logprobs: list[Tensor | None] = []
        for number, (member, hidden) in enumerate(zip(self.ensemble.members, last, strict=True)):
            # The first one is also there for rows where nobody else is heard.
            silent = hidden is None or (number > 0 and not weights[number].any())
            logprobs.append(
                None if silent else torch.log_softmax(logits(member.model, hidden), dim=-1)  # type: ignore[arg-type]
            )
        mixed = self.ensemble.vocabularies.mix(logprobs, torch.from_numpy(weights))
        step = len(self.made[self.alive[0]])
        return next_tokens(mixed, [self.rows[row] for row in self.alive], step)

    def _advance(self) -> tuple[list[Tensor | None], np.ndarray]:
        """Let every member read what was said; which member is up to date in which row."""
        members = self.ensemble.members
        last: list[Tensor | None] = [
            self.caches[0].feed([[self.made[row][-1]] for row in self.alive])[:, -1]
        ]
        members[0].forward_tokens += len(self.alive)
        heard = np.ones((len(members), len(self.alive)), dtype=bool)
        spoken = [self.ensemble.tokenizer.decode(self.made[row]) for row in self.alive]
        for number in range(1, len(members)):
            feed = []
            for slot, (row, text) in enumerate(zip(self.alive, spoken, strict=True)):
                # A text that ends inside a character cannot be shown to another tokenizer yet.
                asked = self.weights[number, slot] > 0 and not text.endswith("\ufffd")
                feed.append(self._reread(number, slot, row, text) if asked else [])
                heard[number, slot] = asked
            if any(feed):
                last.append(self.caches[number].feed(feed)[:, -1])
                members[number].forward_tokens += sum(map(len, feed))
            else:
                last.append(None)
        return last, heard

    def _reread(self, number: int, slot: int, row: int, text: str) -> list[int]:
        """New ids of a row for a member, after taking back those it would now cut otherwise."""
        member, read = self.ensemble.members[number], self.read[number][row]
        prompt, templated = self.prompts[number][row]
        whole = member.tok_encode(prompt + text, False if templated else None)
        ids = whole[self.skipped[number][row] :]
        same = 0
        while same < min(len(ids) - 1, len(read)) and ids[same] == read[same]:
            same += 1
        if len(read) > same:
            self.caches[number].take_back(slot, len(read) - same)
        self.read[number][row] = ids
        return ids[same:]
