"""What a model predicts after each token of a tree that branches off behind a context.

The tree goes through the model in one row, each token seeing the context and its own ancestors
(tree attention); rows are packed to the member's token budget. A beginning that contexts share is
read once. A model that takes no drawn
attention reads each path in a row of its own.

Shapes: N nodes, V vocabulary, D hidden width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fusion.models import hidden_states, logits
from harness import fallback
from harness.packing import batches, beginnings, filled
from harness.scoring import PACKED, SharedPrefixLM


class Branches:
    """A tree of tokens; node 0 is the context's end, every other node a token after its parent.

    context: at least one token.
    """

    def __init__(self, context: Sequence[int]) -> None:
        self.context = list(context)
        self.parents, self.tokens, self.depths = [-1], [-1], [0]
        self.children: dict[tuple[int, int], int] = {}

    def grow(self, node: int, token: int) -> int:
        """The node of a token after another node, made if it is not there."""
        found = self.children.get((node, token))
        if found is None:
            found = self.children[node, token] = len(self.tokens)
            self.parents.append(node)
            self.tokens.append(token)
            self.depths.append(self.depths[node] + 1)
        return found

    def path(self, tokens: Sequence[int], start: int = 0) -> list[int]:
        """The nodes of tokens one after the other."""
        out = []
        for token in tokens:
            start = self.grow(start, token)
            out.append(start)
        return out

    def ancestors(self) -> np.ndarray:
        """Which node sees which, bool (N, N); node 0 is seen as part of the context."""
        seen = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        for node in range(1, len(self.tokens)):
            seen[node] = seen[self.parents[node]]
            seen[node, node] = True
        return seen


class Predictions:
    """What comes after each node of one tree: kept as hidden states, or whole if they say less."""

    def __init__(self, member: SharedPrefixLM, states: Tensor, hidden: bool) -> None:
        self.member, self.states, self.hidden = member, states, hidden

    def logprobs(self, nodes: Sequence[int]) -> Tensor:
        """Float32 log-probabilities (nodes, V) of the next token."""
        return logprobs_at([(self, node) for node in nodes])


def logprobs_at(places: Sequence[tuple[Predictions, int]]) -> Tensor:
    """Float32 log-probabilities (places, V) after nodes of one member's trees.

    They go through the output head together, which reads all of its weights each time.
    """
    first = places[0][0]
    with torch.inference_mode():
        states = [
            found.states[[node for _, node in some]]
            for found, some in itertools.groupby(places, key=lambda place: place[0])
        ]
        z = torch.cat(states) if len(states) > 1 else states[0]
        return torch.log_softmax(logits(first.member.model, z) if first.hidden else z, dim=-1)


def predict(member: SharedPrefixLM, trees: Sequence[Branches]) -> list[Predictions]:
    """Predictions after every node of each tree, in the trees' order."""
    trees = [_cut(tree, member.max_length) for tree in trees]
    out: dict[int, Predictions] = {}
    if not member._shares:
        return [_plainly(member, tree) for tree in trees]
    sizes = [len(tree.context) + len(tree.tokens) - 1 for tree in trees]
    share: list[tuple[int, list[int]]] = []
    rest = list(range(len(trees)))
    if member._grows:
        share, rest = beginnings([tree.context for tree in trees])
    for length, group in share:
        out |= zip(group, _after(member, length, [trees[i] for i in group]), strict=True)
    for places in batches([sizes[index] for index in rest], member.batch_tokens):
        batch = [rest[place] for place in places]
        some = [trees[index] for index in batch]
        hidden = _read(member, some)
        for number, (index, tree) in enumerate(zip(batch, some, strict=True)):
            start = len(tree.context) - 1
            own = hidden[number, start : start + len(tree.tokens)].clone()
            out[index] = Predictions(member, own, True)
    return [out[index] for index in range(len(trees))]


def _cut(tree: Branches, most: int) -> Branches:
    """The tree with its context cut from the left, so that its longest path fits."""
    excess = len(tree.context) + max(tree.depths) - most
    if excess > 0:
        tree.context = tree.context[excess:] or tree.context[-1:]
    return tree


def _after(member: SharedPrefixLM, length: int, trees: Sequence[Branches]) -> Iterator[Predictions]:
    """Predictions of trees whose contexts share their first tokens, which are read once."""
    cache, _ = member._begun(trees[0].context[:length])
    device = member.model.device
    sizes = [len(tree.context) - length + len(tree.tokens) - 1 for tree in trees]
    for some in filled(sizes, min(member.batch_tokens, max(length // 2, PACKED))):
        own = [trees[index] for index in some]
        total = sum(sizes[index] for index in some)
        allowed = torch.zeros((total, total), dtype=torch.bool)
        ids: list[int] = []
        positions: list[int] = []
        for tree in own:
            start, rest = len(ids), tree.context[length:]
            ids += rest + tree.tokens[1:]
            positions += [*range(len(rest)), *(len(rest) - 1 + d for d in tree.depths[1:])]
            allowed[start : len(ids), start : len(ids)] = _sight(len(rest), tree)
        member.forward_tokens += total
        with torch.inference_mode():
            hidden = cache.beside(
                torch.tensor(ids, device=device),
                torch.tensor(positions, device=device),
                allowed.to(device),
            )
        end = 0
        for tree, index in zip(own, some, strict=True):
            end += sizes[index]
            yield Predictions(member, hidden[end - len(tree.tokens) : end].clone(), True)


def _sight(context: int, tree: Branches) -> Tensor:
    """Which slot of a context's last tokens and its tree sees which, bool (T, T)."""
    size = context + len(tree.tokens) - 1
    out = torch.ones(size, size, dtype=torch.bool).tril()
    out[context:, context:] = torch.from_numpy(tree.ancestors()[1:, 1:])
    return out


def _read(member: SharedPrefixLM, trees: Sequence[Branches]) -> Tensor:
    """Hidden states (B, T, D) of rows of a context and its tree."""
    width = max(len(tree.context) + len(tree.tokens) - 1 for tree in trees)
    ids = torch.zeros((len(trees), width), dtype=torch.long)
    positions = torch.zeros((len(trees), width), dtype=torch.long)
    allowed = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, tree in enumerate(trees):
        start, count = len(tree.context), len(tree.tokens) - 1
        ids[row, : start + count] = torch.tensor(tree.context + tree.tokens[1:])
        depths = [start - 1 + depth for depth in tree.depths[1:]]
        positions[row, : start + count] = torch.tensor([*range(start), *depths])
        allowed[row, : start + count, : start + count] = _sight(start, tree)
        member.forward_tokens += start + count
    device = member.model.device
    with torch.inference_mode():
        return hidden_states(member.model, ids.to(device), positions.to(device), allowed.to(device))


def _plainly(member: SharedPrefixLM, tree: Branches) -> Predictions:
    """Each path in a row of its own, whose logits are the plain model's."""
    states: list[Tensor] = [torch.empty(0)] * len(tree.tokens)
    for leaf in sorted(set(range(len(tree.tokens))) - set(tree.parents)):
        nodes = []
        node = leaf
        while node >= 0:
            nodes.append(node)
            node = tree.parents[node]
        nodes.reverse()
        ids = tree.context + [tree.tokens[n] for n in nodes[1:]]
        found = fallback.plain_logits(member.model, ids)[-len(nodes) :]
        member.forward_tokens += len(ids)
        for n, row in zip(nodes, found, strict=True):
            states[n] = row
    return Predictions(member, torch.stack(states), False)
