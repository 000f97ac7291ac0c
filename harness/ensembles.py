"""Several models as one lm-eval model, whatever their vocabularies.

Members are weighed by an ensemble rule (`rules.py`), which also says what the weights mix and at
which level: whole choices or chunks between common token ends (`mixing.py`), tokens of the first
member's vocabulary (`tokenwise.py`, `speaking.py`) or bytes (`bytewise.py`). A member that is all
of the weight is given back as it is.

Shapes: M members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse

from fusion.conversations import CHAT, words
from fusion.tokens import fingerprint, tokenize
from harness.mixing import evidence, mix_chunks, mixture, vote
from harness.packing import alike
from harness.rolling import Rolled
from harness.rules import ENSEMBLE_RULES, Level, Weighing
from harness.scoring import LM, Generation, Instance, Pair, Scored, SharedPrefixLM
from harness.speaking import Speaking
from harness.tokenwise import Vocabularies
from harness.treewise import by_byte, by_token, rolling_by_byte, rolling_by_token

Scores = list[tuple[float, bool]]


class EnsembleLM(LM):
    """An lm-eval model of several members.

    A conversation is read by each member in its own chat template; what is said then is one text.
    members: the first one's vocabulary is spoken. rule: a key of ENSEMBLE_RULES; parameters: its
    own. maps: csr (U, V) for each further member. weights: of the members, equal if not given; a
    rule that reads the prompt multiplies them. level: at which choices are mixed, if not the
    rule's own. Raises RecipeError with all that is wrong with these.
    """

    chats = ("generate_until",)  # requests that may be conversations

    def __init__(
        self,
        members: Sequence[SharedPrefixLM],
        rule: str,
        parameters: dict[str, float],
        maps: Sequence[sparse.csr_array],
        weights: Sequence[float] | None = None,
        level: Level | None = None,
    ) -> None:
        super().__init__()
        self.members = list(members)
        self.maps = list(maps)
        self.weigh = Weighing(rule, parameters, len(self.members), weights, level)
        self.mixing = self.weigh.mixing
        self.level = self.mixing.scoring
        self.notes = list(dict.fromkeys(note for member in self.members for note in member.notes))
        if self.level == "byte" and self._one_tokenizer():
            self.level = "token"
            if not self.alone:
                self.notes.append("members of one tokenizer were mixed by token, not by byte")
        self.engine = {"mixing": str(self.mixing)}
        for number, member in enumerate(self.members, 1):
            self.engine |= {f"member {number} {key}": said for key, said in member.engine.items()}

    @property
    def forward_tokens(self) -> int:
        """What went through all members; one that is there twice counts once."""
        return sum(m.forward_tokens for m in {id(m): m for m in self.members}.values())

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the member whose vocabulary is spoken."""
        return self.members[0].tokenizer

    @cached_property
    def vocabularies(self) -> Vocabularies:
        """What the further members predict, in the first one's vocabulary."""
        return Vocabularies(self.members, self.maps, self.mixing.what)

    def _one_tokenizer(self) -> bool:
        alive = {id(m): m for m in (self.members[j] for j in self.weigh.alive)}
        return len(alive) == 1 or len({fingerprint(m.tokenizer) for m in alive.values()}) == 1

    @property
    def alone(self) -> SharedPrefixLM | None:
        """The member that is all of the ensemble, if one is."""
        alive = self.weigh.alive
        return self.members[alive[0]] if len(alive) == 1 else None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Scores:
        """(log-probability of the mixture, whether greedy) of each continuation.

        Greedy: by token and by byte under the mixture, else for all members that count.
        """
        if self.alone:
            return self.alone.loglikelihood(requests)
        pairs = [member.pairs(requests) for member in self.members]
        if self.level in ("token", "byte"):
            return self._by_tree(requests, pairs)
        scored = [
            member.score(pair, contexts=self.weigh.reads_prompt)
            for member, pair in zip(self.members, pairs, strict=True)
        ]
        weights = self._weights(requests, scored)
        if self.mixing.what == "votes":
            weights = self._voted(requests, scored, weights)
        out = []
        for index, request in enumerate(requests):
            own = [s[index] for s in scored]
            some = np.flatnonzero(weights[index])
            if len(some) == 1:
                total = own[some[0]].total
            elif self.level == "sequence":
                total = float(mixture(np.array([s.total for s in own]), weights[index]))
            else:
                text = "".join(request.args)
                logprobs = [s.logprobs.numpy() for s in own]
                total = mix_chunks(logprobs, self._ends(text, logprobs), weights[index])
            out.append((total, all(own[j].greedy for j in some)))
        return out

    def _ends(self, text: str, logprobs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Byte ends of a text's last tokens, as many as there are log-probabilities."""
        out = []
        for member, found in zip(self.members, logprobs, strict=True):
            ends = tokenize(member.tokenizer, text).ends
            missing = max(0, len(found) - len(ends))
            out.append(np.concatenate([np.zeros(missing, np.int64), ends])[-len(found) :])
        return out if all(map(len, logprobs)) else [end[:0] for end in out]

    def _weights(
        self, requests: Sequence[Instance], scored: Sequence[Sequence[Scored]]
    ) -> list[np.ndarray]:
        """The members' weights for each request; the same for all that share a context."""
        known: dict[str, np.ndarray] = {}
        for index, request in enumerate(requests):
            context = request.args[0]
            if context not in known:
                read = [s[index].context for s in scored] if self.weigh.reads_prompt else []
                known[context] = self.weights(context, [x.numpy() for x in read if x is not None])
        return [known[request.args[0]] for request in requests]

    def weights(self, context: str, logprobs: Sequence[np.ndarray]) -> np.ndarray:
        """The members' weights (M,) after a prompt, from the log-probabilities of its last tokens.

        Equal members where nothing is asked about it, or there is nothing in it.
        """
        prompt = context.rstrip()
        if not logprobs or not prompt:
            return self.weigh(np.zeros(len(self.members)))
        ends = [tokenize(member.tokenizer, prompt).ends for member in self.members]
        return self.weigh(*evidence(logprobs, ends))

    def heard(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """The members' weights (M,) after prompts, which each member reads once for that.

        Of a conversation members are weighed by its words as plain text: what their templates write
        around them is not the same for two members, so that it tells them apart for no merit.
        """
        if not self.weigh.reads_prompt:
            return [self.weights(prompt, []) for prompt in prompts]
        texts = [words(prompt) if prompt.startswith(CHAT) else prompt for prompt in prompts]
        scored = []
        for member in self.members:
            read = [member.tok_encode(text)[-member.max_length :] for text in texts]
            scored.append(member.score([(ids[:1], ids[1:]) for ids in read]))
        return [
            self.weights(text, [found[index].logprobs.numpy() for found in scored])
            for index, text in enumerate(texts)
        ]

    def _voted(
        self,
        requests: Sequence[Instance],
        scored: Sequence[Sequence[Scored]],
        weights: list[np.ndarray],
    ) -> list[np.ndarray]:
        """Each question's weights, of the members that voted for the winner."""
        questions: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            question = (request.task_name, request.doc_id)
            alone = request.doc_id is None
            questions.setdefault(request.args[0] if alone else question, []).append(index)
        out = list(weights)
        for choices in questions.values():
            totals = np.array([[s[index].total for s in scored] for index in choices])
            sizes = [len(requests[index].args[1].encode()) for index in choices]
            voted = vote(totals, weights[choices[0]], sizes)
            for index in choices:
                out[index] = voted
        return out

    def _by_tree(self, requests: list[Instance], pairs: Sequence[Sequence[Pair]]) -> Scores:
        """By token or byte: all continuations of a context in one row of each member."""
        contexts: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            contexts.setdefault(request.args[0], []).append(index)
        firsts = [indices[0] for indices in contexts.values()]
        weights = dict.fromkeys(contexts, self.weigh(np.zeros(len(self.members))))
        if self.weigh.reads_prompt:
            scored = [
                member.score([pair[index] for index in firsts], contexts=True)
                for member, pair in zip(self.members, pairs, strict=True)
            ]
            found = self._weights([requests[index] for index in firsts], scored)
            weights = dict(zip(contexts, found, strict=True))
        out: dict[int, tuple[float, bool]] = {}
        mixed = []
        for context, indices in contexts.items():
            (some,) = np.nonzero(weights[context])
            if len(some) == 1:  # one member is all: as that member says
                own = self.members[some[0]].loglikelihood([requests[i] for i in indices])
                out |= zip(indices, own, strict=True)
            else:
                mixed.append(context)
        asked = [(c, [requests[i].args[1] for i in contexts[c]]) for c in mixed]
        w = [weights[context] for context in mixed]
        if self.level == "byte":
            answers = by_byte(self.members, asked, w)
        else:
            read = [[[pair[i] for i in contexts[c]] for c in mixed] for pair in pairs]
            answers = by_token(self.members, self.vocabularies, asked, read, w)
        for context, scores in zip(mixed, answers, strict=True):
            out |= zip(contexts[context], scores, strict=True)
        return [out[index] for index in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of each whole text; without a prompt the rule sees equal members."""
        if self.alone:
            return self.alone.loglikelihood_rolling(requests)
        weights = self.weigh(np.zeros(len(self.members)))
        some = np.flatnonzero(weights)
        if len(some) == 1:
            return self.members[some[0]].loglikelihood_rolling(requests)
        texts = [request.args[0] for request in requests]
        if self.level == "byte":
            return [rolling_by_byte(self.members, *_ruled(r, weights)) for r in requests]
        if self.level == "token":
            spoken = self.vocabularies
            return [rolling_by_token(self.members, spoken, *_ruled(r, weights)) for r in requests]
        logprobs: list[list[np.ndarray]] = []
        for member in self.members:
            windows = [member.windows(*request.args) for request in requests]
            scored = iter(member.score([pair for pairs in windows for pair in pairs]))
            logprobs.append(
                [
                    np.concatenate([np.zeros(0), *(next(scored).logprobs.numpy() for _ in pairs)])
                    for pairs in windows
                ]
            )
        out = []
        for index, text in enumerate(texts):
            parts = [member[index] for member in logprobs]
            if self.level == "sequence":
                out.append(float(mixture(np.array([part.sum() for part in parts]), weights)))
            else:
                out.append(mix_chunks(parts, self._ends(text, parts), weights))
        return out

    def rolling(self, requests: list[Instance]) -> list[Rolled]:
        """Log-probability of each whole text; the members' tokens are not the mixture's."""
        return [Rolled(total, None) for total in self.loglikelihood_rolling(requests)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continuations of the mixture."""
        return [generation.text for generation in self.generate(requests)]

    def generate(
        self, requests: Sequence[Instance], done: Callable[[int], None] = lambda n: None
    ) -> list[Generation]:
        """Generations of the mixture with their finish reasons; drawn where a request asks for it.

        A vote or a selection is among whole texts, each of one member.
        """
        if self.alone:
            return self.alone.generate(requests, done)
        if self.mixing.what == "votes":
            return self._vote_texts(requests)
        if self.mixing.what == "selection":
            return self._select(requests)
        out: dict[int, Generation] = {}
        prepared = self.members[0]._prepared(requests)
        lengths = [len(row.ids) for row in prepared]
        for rows in alike(lengths, self.members[0].generate_rows):
            contexts = [requests[i].args[0] for i in rows]
            with torch.inference_mode():
                batch = Speaking(self, contexts, [prepared[i] for i in rows])
                out |= zip(rows, batch.run(), strict=True)
            done(len(out))
        return [out[index] for index in range(len(requests))]

    def _select(self, requests: Sequence[Instance]) -> list[Generation]:
        """Each text as the member says it that the rule selects for its prompt."""
        chosen = [int(w.argmax()) for w in self.heard([request.args[0] for request in requests])]
        out: dict[int, Generation] = {}
        for number, member in enumerate(self.members):
            own = [index for index, who in enumerate(chosen) if who == number]
            out |= zip(own, member.generate([requests[i] for i in own]), strict=True)
        return [out[index] for index in range(len(requests))]

    def _vote_texts(self, requests: Sequence[Instance]) -> list[Generation]:
        """Each text that most members say; of level ones the likeliest, per byte, to its own."""
        alive = self.weigh.alive
        said = {int(j): self.members[j].generate(requests) for j in alive}
        out = []
        for index, request in enumerate(requests):
            texts = {j: said[j][index].text.strip() for j in said}
            heard = {
                text: sum(self.weigh.prior[j] for j in texts if texts[j] == text)
                for text in texts.values()
            }
            most = max(heard.values())
            level = [text for text, share in heard.items() if share >= most - 1e-9]
            if len(level) > 1:
                level.sort(key=lambda text: -self._found(request, texts, text))  # type: ignore[misc]
            first = next(j for j in texts if texts[j] == level[0])
            out.append(said[first][index])
        return out

    def _found(self, request: Instance, texts: dict[int, str], text: str) -> float:
        """How likely, per byte, a text is to the members that said it."""
        if not text:
            return -np.inf
        asked = Instance("loglikelihood", {}, (request.args[0], text), 0)
        own = [j for j in texts if texts[j] == text]
        found = [self.members[j].loglikelihood([asked])[0][0] for j in own]
        w = self.weigh.prior[own]
        return float(w @ np.array(found) / w.sum()) / len(text.encode())


__all__ = ["ENSEMBLE_RULES", "EnsembleLM", "mix_chunks"]


def _ruled(request: Instance, weights: np.ndarray) -> tuple[str, np.ndarray, Any]:
    """A text, weights, and the rule for its windows, None where the task has none."""
    text, *rule = request.args
    return text, weights, rule[0] if rule else None
