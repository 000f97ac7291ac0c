"""What a model predicts after each token of a tree that branches off behind a context.

The tree goes through the model in one row, each token seeing the context and its own ancestors
(tree attention); rows are packed to the member's token budget. A model that takes no drawn
attention reads each path in a row of its own.

Shapes: N nodes, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusion.models import hidden_states, logits
from harness import fallback
from harness.packing import batches
from harness.scoring import SharedPrefixLM


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
        with torch.inference_mode():
            states = self.states[list(nodes)]
            z = logits(self.member.model, states) if self.hidden else states
            return torch.log_softmax(z, dim=-1)


def predict(member: SharedPrefixLM, trees: Sequence[Branches]) -> list[Predictions]:
    """Predictions after every node of each tree, in the trees' order."""
    trees = [_cut(tree, member.max_length) for tree in trees]
    out: dict[int, Predictions] = {}
    if not member._shares:
        return [_plainly(member, tree) for tree in trees]
    sizes = [len(tree.context) + len(tree.tokens) - 1 for tree in trees]
    for batch in batches(sizes, member.batch_tokens):
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
        allowed[row, :start, :start] = torch.ones(start, start, dtype=torch.bool).tril()
        allowed[row, start : start + count, :start] = True
        allowed[row, start : start + count, start : start + count] = torch.from_numpy(
            tree.ancestors()[1:, 1:]
        )
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
