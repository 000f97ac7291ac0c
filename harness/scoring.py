"""An lm-eval model over transformers that computes what requests share only once.

A question and all its choices go through the model in one row: the choices follow the context side
by side, each sees the context and itself (tree attention), hidden states are gathered before the
output head, and log-softmax and sums are float32 or better. Tokenization, truncation and BOS are
lm-eval's own. Where the plain model is not reproduced (ALiBi, recurrence, ...), each choice has a
plain row of its own, and `notes` says so.

Registered with lm-eval as "kfuse": `python -m harness.scoring` is lm-eval's command line with it.

Shapes: B rows, T positions, V vocabulary, D hidden width.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.registry import get_model, register_model
from torch import Tensor

from fusion.conversations import CHAT, asked, closing_id
from fusion.errors import RunError
from fusion.models import (
    causal_pattern,
    hidden_states,
    load_model,
    load_tokenizer,
    require_fit,
    token_logprobs,
)
from harness import fallback
from harness.caching import GrowingCache
from harness.fallback import Scored
from harness.generation import (
    Begun,
    Generation,
    Stopper,
    of_one_length,
    plainly,
    sampling,
    together,
)
from harness.packing import (
    Row,
    Tree,
    alike,
    batches,
    beginnings,
    filled,
    tree_row,
    tree_size,
    wanted_slots,
)
from harness.rolling import Rolled, joined, windows

PACKED = 512  # tokens that follow a shared beginning in one row, or half its length if more
SIDE_BY_SIDE = 256  # tokens of continuations that share a row, or the context's length if more
CPU_POSITIONS = 1024  # a forward on the CPU: wider ones pad more, narrower ones share less work

Pair = tuple[list[int], list[int]]  # context ids, continuation ids


@register_model("kfuse")
class SharedPrefixLM(TemplateLM):
    """An lm-eval model that scores all choices of a question in one row.

    pretrained: a model folder. dtype: float32 or bfloat16. batch_tokens: positions a forward pass
    (on the CPU at most CPU_POSITIONS). seed: of samples, where a request asks for them. batch_size
    and max_batch_size are lm-eval's and not used: what goes together follows from lengths.

    notes: sentences for a report, one for each thing that is not done the usual way. engine: what
    computed the scores: name, scoring ("tree" or "rows"), generation ("cache" or "transformers"),
    attention, dtype, versions.
    """

    chats = ("generate_until", "loglikelihood")  # requests that may be conversations

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        device: str | None = None,
        batch_tokens: int | str = 4096,
        generate_rows: int | str = 32,
        max_length: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        seed: int | str = 17,
    ) -> None:
        super().__init__()
        place = device or "cuda"
        if place.startswith("cuda") and not torch.cuda.is_available():
            place = "cpu"  # lm-eval's command line asks for cuda:0 unless told otherwise
        self.model = load_model(pretrained, dtype, place)
        self.tokenizer = load_tokenizer(pretrained)
        # Without tokens that were added: a padding token may lie behind the last row, unused.
        require_fit(self.model.config, self.tokenizer.vocab_size, pretrained)
        on_cpu = torch.device(place).type == "cpu"
        self.batch_tokens = min(int(batch_tokens), CPU_POSITIONS) if on_cpu else int(batch_tokens)
        self.generate_rows, self.seed = int(generate_rows), int(seed)
        config = self.model.config.get_text_config(decoder=True)
        known = getattr(config, "max_position_embeddings", None) or 2048
        self.max_length = int(max_length or known)
        self.max_gen_toks = 256
        self.forward_tokens = 0  # what went through the model, for the cost ledger
        unlike = fallback.unlike_tree(
            self.model, lambda *tree: self._score_trees([(*tree, None)])[0]
        )
        self._shares = unlike is None
        self._grows = self._shares and fallback.cache_works(self.model)
        self.notes = fallback.notes(self.model, unlike, self._grows)
        self.engine = fallback.engine(self.model, self._shares, self._grows)
        self.forward_tokens = 0  # trying out is no cost of a measurement

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def reads(self, prompt: str) -> tuple[str, bool]:
        """A prompt as text, and whether the model's chat template wrote it, special tokens and
        all: a conversation's own, if there is a template, else what is read in its place.
        """
        return asked(self.tokenizer, prompt) if prompt.startswith(CHAT) else (prompt, False)

    @cached_property
    def _closing(self) -> int | None:
        """What closes an answer in the chat template, which need not be the end of text."""
        return closing_id(self.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids as lm-eval's own transformers backend makes them.

        A prompt that is a conversation (`fusion.conversations.asking`) by the model's own template.
        """
        string, templated = self.reads(string)
        if templated:
            return self.tokenizer.encode(string, add_special_tokens=False)
        if add_special_tokens is None:
            first = str(self.tokenizer.decode([self.prefix_token_id]))
            doubled = bool(first) and string.startswith(first)
            return self.tokenizer.encode(
                string, **({"add_special_tokens": False} if doubled else {})
            )
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def pairs(self, requests: Sequence[Instance]) -> list[Pair]:
        """Context and continuation ids of log-likelihood requests, by lm-eval's rules."""
        out = []
        for prompt, continuation in (request.args for request in requests):
            context, templated = self.reads(prompt)
            if templated:
                read = [
                    self.tokenizer.encode(text, add_special_tokens=False)
                    for text in (context, context + continuation)
                ]
                out.append((read[0], read[1][len(read[0]) :]))
            elif context == "":
                ids = self.tok_encode(continuation, add_special_tokens=False)
                first = self.prefix_token_id
                out.append(([first], ids) if ids[0] != first else (ids[:1], ids[1:]))
            else:
                out.append(self._encode_pair(context, continuation))
        return out

    def windows(self, text: str, rule: Mapping[str, int] | None = None) -> list[Pair]:
        """Windows that predict every token of a text once (`rolling`).

        Relative to lm-eval, which asks for BOS after BOS where the tokenizer adds it: context only.
        """
        ids, before = self.tok_encode(text, add_special_tokens=False), self.prefix_token_id
        return windows(self.tokenizer, ids, text, before, self.max_length, rule)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each continuation."""
        return [(s.total, s.greedy) for s in self.score(self.pairs(requests))]

    def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
        return [(s.total, s.greedy) for s in self.score([(r[1], r[2]) for r in requests])]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of each whole text."""
        return [rolled.logprob for rolled in self.rolling(requests)]

    def rolling(self, requests: Sequence[Instance]) -> list[Rolled]:
        """Log-probability of each whole text, and of how many tokens."""
        found = [self.windows(*request.args) for request in requests]
        return joined(found, self.score([pair for pairs in found for pair in pairs]))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations, cut at their stop strings."""
        return [generation.text for generation in self.generate(requests)]

    def score(self, pairs: Sequence[Pair], contexts: bool = False) -> list[Scored]:
        """Every continuation's token log-probabilities; contexts that are equal are read once.

        contexts: the contexts' own tokens as well.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            # The model reads all but the last token; what exceeds it is cut from the left.
            excess = len(context) + len(continuation) - 1 - self.max_length
            kept = tuple(context[max(0, excess) :]) or tuple(context[-1:])
            groups.setdefault(kept if self._shares else (*kept, -1 - index), []).append(index)
        trees: list[Tree] = []
        for key, members in groups.items():
            context = [token for token in key if token >= 0]
            # Attention is quadratic in a row's length: beyond this, reading again costs less.
            most = max(len(context), SIDE_BY_SIDE)
            for some in filled([len(pairs[i][1]) for i in members], most):
                own = [members[i] for i in some]
                trees.append((context, [pairs[i][1] for i in own], own))
        share: list[tuple[int, list[int]]] = []
        rest = list(range(len(trees)))
        if self._grows:
            share, rest = beginnings([context for context, _, _ in trees])
        out: dict[int, Scored] = {}
        for length, members in share:
            for tree, scored in self._score_after(length, [trees[i] for i in members], contexts):
                out.update(zip(tree[2], scored, strict=True))
        if not self._shares:
            return [self._score_plainly(context, xs[0]) for context, xs, _ in trees]
        alone = [trees[i] for i in rest]
        for batch in batches([tree_size(tree) for tree in alone], self.batch_tokens):
            found = self._score_trees([alone[i] for i in batch], contexts)
            for index, scored in zip(batch, found, strict=True):
                out.update(zip(alone[index][2], scored, strict=True))
        return [out[index] for index in range(len(pairs))]

    def _score_plainly(self, context: list[int], tokens: list[int]) -> Scored:
        self.forward_tokens += len(context) + len(tokens) - 1
        return fallback.score_plainly(self.model, context, tokens)

    def _score_after(
        self, length: int, trees: Sequence[Tree], contexts: bool
    ) -> Iterator[tuple[Tree, list[Scored]]]:
        """Trees whose contexts share their first tokens, which are read once, in packed rows."""
        device = self.model.device
        cache, begun = self._begun(shared := trees[0][0][:length])
        read = self._gather(begun[:-1], torch.tensor(shared[1:]))[0] if contexts else None
        with torch.inference_mode():
            sizes = [tree_size(tree) - length for tree in trees]
            for some in filled(sizes, min(self.batch_tokens, max(length // 2, PACKED))):
                pack = [trees[i] for i in some]
                rows = [tree_row(context[length:], xs) for context, xs, _ in pack]
                ids, segments, positions = (
                    torch.tensor([x for row in rows for x in row[i]], device=device)
                    for i in range(3)
                )
                owner = torch.repeat_interleave(
                    torch.arange(len(rows)), torch.tensor([len(row[0]) for row in rows])
                ).to(device)
                same = owner[:, None] == owner[None, :]
                valid = torch.ones_like(ids, dtype=torch.bool)[None]
                seen = causal_pattern(segments[None], valid)[0] & same
                self.forward_tokens += len(ids)
                # What the beginning ends with predicts each context's first token after it.
                hidden = torch.cat([begun[-1:], cache.beside(ids, positions, seen)])
                slots, gold, sizes_ = [], [], []
                start = 1
                for (context, xs, _), row in zip(pack, rows, strict=True):
                    if contexts:
                        rest = context[length:]
                        slots += [0, *range(start, start + len(rest) - 1)]
                        gold += rest
                        sizes_.append(len(rest))
                    for at, tokens in wanted_slots(len(context) - length, xs):
                        slots += [start + slot for slot in at]
                        gold += tokens
                        sizes_.append(len(tokens))
                    start += len(row[0])
                found = self._split(hidden[slots], gold, sizes_)
                for tree in pack:
                    own = None if read is None else torch.cat([read, next(found)[0]])
                    scored = [next(found) for _ in tree[1]]
                    yield tree, [Scored(lp, bool(best.all()), own) for lp, best in scored]

    def _begun(self, ids: list[int]) -> tuple[GrowingCache, Tensor]:
        """A cache of one row that has read these tokens, and their hidden states (T, D)."""
        cache = GrowingCache(self.model, 1)
        with torch.inference_mode():
            hidden = cache.feed([ids])[0]
        self.forward_tokens += len(ids)
        return cache, hidden

    def _score_trees(self, trees: Sequence[Tree], contexts: bool = False) -> list[list[Scored]]:
        """One row a tree: context, then its continuations side by side, less their last token."""
        rows = [tree_row(context, continuations) for context, continuations, _ in trees]
        at_row, at_slot, gold, sizes = [], [], [], []
        for number, (context, continuations, _) in enumerate(trees):
            wanted = list(wanted_slots(len(context), continuations))
            if contexts:
                wanted.insert(0, (list(range(len(context) - 1)), context[1:]))
            for slots, tokens in wanted:
                at_row += [number] * len(slots)
                at_slot += slots
                gold += tokens
                sizes.append(len(tokens))
        parts = self._split(self._hidden(rows)[at_row, at_slot], gold, sizes)
        out = []
        for _, continuations, _ in trees:
            read = next(parts)[0] if contexts else None
            found = [next(parts) for _ in continuations]
            out.append([Scored(lp, bool(best.all()), read) for lp, best in found])
        return out

    def _split(
        self, hidden: Tensor, gold: list[int], sizes: list[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-probabilities and whether greedy, of each continuation's tokens."""
        logprobs, greedy = self._gather(hidden, torch.tensor(gold))
        yield from zip(logprobs.split(sizes), greedy.split(sizes), strict=True)

    def _hidden(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states (B, T, D) of rows of ids, segments and positions, padded to one width."""
        width = max(len(ids) for ids, _, _ in rows)
        stacked = [
            torch.tensor([row[i] + [fill] * (width - len(row[i])) for row in rows])
            for i, fill in enumerate((0, -1, 0))
        ]
        ids, segments, positions = (x.to(self.model.device) for x in stacked)
        self.forward_tokens += sum(len(row[0]) for row in rows)
        with torch.inference_mode():
            pattern = causal_pattern(segments, segments >= 0)
            return hidden_states(self.model, ids, positions, pattern)

    def _gather(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            logprobs, greedy = token_logprobs(self.model, hidden, tokens.to(hidden.device))
        return logprobs.double().cpu(), greedy.cpu()

    def generate(
        self, requests: Sequence[Instance], done: Callable[[int], None] = lambda n: None
    ) -> list[Generation]:
        """Generations with their finish reasons; greedy, or drawn where a request asks for it.

        A request that is there n times gets n samples, numbered as they come.
        """
        out: dict[int, Generation] = {}
        prepared = self._prepared(requests)
        if not self._grows:
            for some in of_one_length(prepared, self.generate_rows):
                self._note(out, some, plainly(self.model, [prepared[i] for i in some]))
                done(len(out))
            return [out[index] for index in range(len(requests))]
        share, rest = beginnings([row.ids for row in prepared])
        for length, members in [*share, (0, rest)]:
            begun = self._begun(prepared[members[0]].ids[:length])[0] if length else None
            for some in alike([len(prepared[i].ids) - length for i in members], self.generate_rows):
                rows = [members[i] for i in some]
                cache = begun.spread(len(rows)) if begun else GrowingCache(self.model, len(rows))
                found = together(self.model, [prepared[i] for i in rows], cache, length)
                self._note(out, rows, found)
                done(len(out))
        return [out[index] for index in range(len(requests))]

    def _note(
        self, out: dict[int, Generation], rows: list[int], found: tuple[list[Generation], int]
    ) -> None:
        out.update(zip(rows, found[0], strict=True))
        self.forward_tokens += found[1]

    def _prepared(self, requests: Sequence[Instance]) -> list[Begun]:
        seen: Counter[str] = Counter()
        out = []
        for request in requests:
            context, arguments = request.args
            drawn = sampling(arguments, self.seed, context, seen[context])
            seen[context] += drawn is not None
            out.append(Begun(*self._asked(request), drawn))
        return out

    def _asked(self, request: Instance) -> tuple[list[int], Stopper]:
        """Prompt ids, cut from the left to leave room, and the rule by which the text stops."""
        context, arguments = request.args
        most = int(
            arguments.get("max_gen_toks", arguments.get("max_new_tokens", self.max_gen_toks))
        )
        until = arguments.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        until.append(self.tokenizer.decode([self.eot_token_id]))
        ends = {self.eot_token_id}
        if self.reads(context)[1] and self._closing is not None:
            ends.add(self._closing)
        ids = self.tok_encode(context)[-max(1, self.max_length - most) :]
        return ids, Stopper(self.tokenizer, [stop for stop in until if stop], ends, most)


def stock(pretrained: str, device: str, dtype: str = "float32", backend: str = "hf") -> LM:
    """lm-eval's own model on the same weights: its transformers backend, or vLLM.

    Scores are float32 sums whatever the dtype. ImportError if a backend's library is not there.
    """
    import lm_eval.models  # noqa: F401  # only then are their names known

    if backend == "hf":
        own: dict[str, Any] = {"device": device, "batch_size": 16, "softmax_dtype": "float32"}
    else:
        own = {"batch_size": "auto"}  # vLLM finds its device by itself
    return get_model(backend)(pretrained=pretrained, dtype=dtype, **own)


def main() -> None:
    """lm-eval's own command line, where `--model kfuse` is known: it looks for no plug-ins."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except RunError as error:
        sys.exit(f"kfuse: {error}")


__all__ = ["LM", "Generation", "Instance", "Pair", "Scored", "SharedPrefixLM", "Stopper", "stock"]

if __name__ == "__main__":
    main()
