"""Several models as one lm-eval model, whatever their vocabularies.

Members are weighed by an ensemble rule on the prompt. A continuation is scored chunk by chunk: a
chunk lies between two byte positions where tokens of all members end, and its probability is the
weighted mean of the members' probabilities. Generation mixes next-token probabilities in the first
member's vocabulary, where the others arrive through the prefix map; after every token each other
member re-reads the text's end and takes back what it would now cut differently.

Shapes: M members, B rows, V vocabulary of the first member, U of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from fusion.models import logits, token_logprobs
from fusion.tokens import tokenize
from harness.caching import GrowingCache
from harness.packing import alike
from harness.rolling import Rolled
from harness.rules import ENSEMBLE_RULES
from harness.scoring import LM, Generation, Instance, Pair, Scored, SharedPrefixLM, Stopper

MIXING = "probabilities: scoring by chunk between common token ends, generation by token"


class EnsembleLM(LM):
    """An lm-eval model of several members.

    members: the first one's vocabulary is spoken. maps: csr (U, V) for each further member.
    """

    def __init__(
        self,
        members: Sequence[SharedPrefixLM],
        rule: str,
        parameters: dict[str, float],
        maps: Sequence[sparse.csr_array],
    ) -> None:
        super().__init__()
        self.members = list(members)
        self.maps = list(maps)
        self.weigh: Callable[[np.ndarray], np.ndarray] = lambda bits: ENSEMBLE_RULES[rule](
            bits, **parameters
        )

    @property
    def forward_tokens(self) -> int:
        """What went through all members."""
        return sum(member.forward_tokens for member in self.members)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the member whose vocabulary is spoken."""
        return self.members[0].tokenizer

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-probability of the mixture, whether greedy for all members) of each continuation."""
        texts = [request.args for request in requests]
        pairs = [member.pairs(requests) for member in self.members]
        scored = [m.score(p, contexts=True) for m, p in zip(self.members, pairs, strict=True)]
        out = []
        for index, (context, continuation) in enumerate(texts):
            one = [(p[index], s[index]) for p, s in zip(pairs, scored, strict=True)]
            weights = self.weigh(self._prompt_bits(context, one))
            ends = [
                self._ends(member, context + continuation, len(pair[1]))
                for member, (pair, _) in zip(self.members, one, strict=True)
            ]
            total = mix_chunks([s.logprobs.numpy() for _, s in one], ends, weights)
            out.append((total, all(s.greedy for _, s in one)))
        return out

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of each whole text; without a prompt the rule sees equal members."""
        logprobs: list[list[np.ndarray]] = []
        for member in self.members:
            windows = [member.windows(*request.args) for request in requests]
            scored = iter(member.score([pair for pairs in windows for pair in pairs]))
            logprobs.append(
                [
                    np.concatenate([next(scored).logprobs.numpy() for _ in pairs])
                    for pairs in windows
                ]
            )
        weights = self.weigh(np.zeros(len(self.members)))
        out = []
        for index, request in enumerate(requests):
            parts = [member[index] for member in logprobs]
            ends = [
                self._ends(member, request.args[0], len(part))
                for member, part in zip(self.members, parts, strict=True)
            ]
            out.append(mix_chunks(parts, ends, weights))
        return out

    def rolling(self, requests: list[Instance]) -> list[Rolled]:
        """Log-probability of each whole text; the members' tokens are not the mixture's."""
        return [Rolled(total, None) for total in self.loglikelihood_rolling(requests)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations of the mixture."""
        return [generation.text for generation in self.generate(requests)]

    def generate(
        self, requests: Sequence[Instance], done: Callable[[int], None] = lambda n: None
    ) -> list[Generation]:
        """Greedy generations of the mixture with their finish reasons."""
        out: dict[int, Generation] = {}
        prepared = [self.members[0].prompt(request) for request in requests]
        lengths = [len(ids) for ids, _ in prepared]
        for rows in alike(lengths, self.members[0].generate_rows):
            with torch.inference_mode():
                batch = _Speaking(self, [requests[i] for i in rows], [prepared[i][1] for i in rows])
                out |= zip(rows, batch.run(), strict=True)
            done(len(out))
        return [out[index] for index in range(len(requests))]

    def _prompt_bits(self, context: str, one: Sequence[tuple[Pair, Scored]]) -> np.ndarray:
        """Each member's bits per byte on the prompt; equal where there is none."""
        if not context.strip():
            return np.zeros(len(one))
        bits = []
        for member, (pair, scored) in zip(self.members, one, strict=True):
            bits.append(member_bits(member, context, pair[0], scored.context))
        return np.array(bits)

    def _ends(self, member: SharedPrefixLM, text: str, count: int) -> np.ndarray:
        """Byte ends of a text's last `count` tokens."""
        return tokenize(member.tokenizer, text).ends[-count:] if count else np.zeros(0, np.int64)


def member_bits(member: SharedPrefixLM, text: str, ids: Sequence[int], logprob: float) -> float:
    """Bits per byte of a prompt; a first token that nothing predicts does not count."""
    size = len(text.encode())
    if ids and ids[0] != member.tokenizer.bos_token_id:
        size -= int(tokenize(member.tokenizer, text).ends[0])
    return -logprob / (np.log(2) * max(1, size))


def mix_chunks(
    logprobs: Sequence[np.ndarray], ends: Sequence[np.ndarray], weights: np.ndarray
) -> float:
    r"""Log-probability of a text under the mixture, chunk by chunk.

        log P = Σ_c log Σ_j w_j exp(Σ_{t in c} log p_j,t)

    logprobs, ends: for each member its tokens' log-probabilities and byte ends. A chunk ends where
    a token of every member ends; without one, the whole text is one chunk.
    """
    common = set(ends[0].tolist())
    for other in ends[1:]:
        common &= set(other.tolist())
    borders = sorted(common)
    parts = []
    for logprob, end in zip(logprobs, ends, strict=True):
        reached = np.concatenate([[0.0], np.cumsum(logprob)])
        at = np.searchsorted(end, borders[:-1], side="right")
        parts.append(np.diff(reached[np.array([0, *at, len(logprob)], dtype=np.int64)]))
    with np.errstate(divide="ignore"):
        return float(np.logaddexp.reduce(np.log(weights)[:, None] + np.stack(parts), axis=0).sum())


class _Speaking:
    """One batch of rows that generate together: what each member has read, and the weights."""

    def __init__(
        self, ensemble: EnsembleLM, requests: Sequence[Instance], stoppers: Sequence[Stopper]
    ) -> None:
        self.ensemble, self.stoppers = ensemble, list(stoppers)
        self.contexts = [request.args[0] for request in requests]
        self.alive = list(range(len(requests)))
        self.made: list[list[int]] = [[] for _ in requests]
        self.caches = [GrowingCache(member.model, len(requests)) for member in ensemble.members]
        self.weights = np.zeros((len(ensemble.members), len(requests)))
        self.read: list[list[list[int]]] = []  # member, row: ids in its cache
        self.skipped: list[list[int]] = []  # member, row: ids cut from the left of the prompt
        for member in ensemble.members:
            room = max(1, member.max_length - max(stopper.most for stopper in stoppers))
            whole = [member.tok_encode(context) for context in self.contexts]
            self.skipped.append([max(0, len(ids) - room) for ids in whole])
            self.read.append([ids[-room:] for ids in whole])

    def run(self) -> list[Generation]:
        """Generate until every row has stopped."""
        out: dict[int, Generation] = {}
        last = self._prefill()
        current = [np.ones(len(self.alive), dtype=bool)] * len(self.caches)
        while True:
            going = []
            for slot, (row, token) in enumerate(
                zip(self.alive, self._choose(last, current), strict=True)
            ):
                self.made[row].append(token)
                finished = self.stoppers[row].check(self.made[row])
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
            last, current = self._advance()

    def _prefill(self) -> list[Tensor]:
        """Read the prompts; weigh the members by how likely each found them."""
        last: list[Tensor] = []
        bits = []
        for member, cache, ids in zip(self.ensemble.members, self.caches, self.read, strict=True):
            hidden = cache.feed(ids)
            member.forward_tokens += sum(map(len, ids))
            width = hidden.shape[1]
            scores = []
            for row, tokens in enumerate(ids):
                states, total = hidden[row, width - len(tokens) : -1], 0.0
                if len(states):
                    gold = torch.tensor(tokens[1:], device=states.device)
                    total = float(token_logprobs(member.model, states, gold)[0].double().sum())
                text = (
                    self.contexts[row]
                    if not self.skipped[len(last)][row]
                    else str(member.tokenizer.decode(tokens))
                )
                scores.append(member_bits(member, text, tokens, total))
            bits.append(scores)
            last.append(hidden[:, -1])
        self.weights = np.stack(
            [self.ensemble.weigh(column) for column in np.array(bits).T], axis=1
        )
        return last

    def _choose(self, last: Sequence[Tensor], current: Sequence[np.ndarray]) -> list[int]:
        """The likeliest token of the mixture for each row; members that lag behind are left out."""
        # A row where no other member may speak is the first one's alone, whatever it weighs.
        heard = sum(w * c for w, c in zip(self.weights[1:], current[1:], strict=True))
        share = np.where(heard == 0, 1.0, self.weights[0])
        mixed = self._probabilities(0, last[0]) * share[:, None]
        for index, vocabulary_map in enumerate(self.ensemble.maps, 1):
            p = self._probabilities(index, last[index])[:, : vocabulary_map.shape[0]]
            p = (self.weights[index] * current[index])[:, None] * (p @ vocabulary_map)
            wide = min(p.shape[1], mixed.shape[1])
            mixed[:, :wide] += p[:, :wide]
        return mixed.argmax(axis=1).tolist()

    def _probabilities(self, index: int, hidden: Tensor) -> np.ndarray:
        model = self.ensemble.members[index].model
        return torch.softmax(logits(model, hidden), dim=-1).cpu().numpy()

    def _advance(self) -> tuple[list[Tensor], list[np.ndarray]]:
        """Let every member read what was said; which rows of which member are up to date."""
        members = self.ensemble.members
        first = self.caches[0].feed([[self.made[row][-1]] for row in self.alive])[:, -1]
        members[0].forward_tokens += len(self.alive)
        last, current = [first], [np.ones(len(self.alive), dtype=bool)]
        spoken = [self.ensemble.tokenizer.decode(self.made[row]) for row in self.alive]
        for index in range(1, len(members)):
            feed, fresh = [], []
            for slot, (row, text) in enumerate(zip(self.alive, spoken, strict=True)):
                # A text that ends inside a character cannot be shown to another tokenizer yet.
                whole = not text.endswith("\ufffd")
                feed.append(self._reread(index, slot, row, text) if whole else [])
                fresh.append(whole)
            if any(feed):
                hidden = self.caches[index].feed(feed)[:, -1]
                members[index].forward_tokens += sum(map(len, feed))
            else:
                hidden = torch.zeros_like(self._blank(index))
            last.append(hidden)
            current.append(np.array(fresh))
        return last, current

    def _blank(self, index: int) -> Tensor:
        weight = self.ensemble.members[index].model.get_output_embeddings().weight
        return weight.new_zeros((len(self.alive), weight.shape[1]))

    def _reread(self, index: int, slot: int, row: int, text: str) -> list[int]:
        """New ids of a row for a member, after taking back those it would now cut otherwise."""
        member, read = self.ensemble.members[index], self.read[index][row]
        ids = member.tok_encode(self.contexts[row] + text)[self.skipped[index][row] :]
        same = 0
        while same < min(len(ids) - 1, len(read)) and ids[same] == read[same]:
            same += 1
        if len(read) > same:
            self.caches[index].take_back(slot, len(read) - same)
        self.read[index][row] = ids
        return ids[same:]
