"""What goes through a model together: batches by length, and contexts that begin alike."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

SHARED = 64  # tokens; a common beginning shorter than this is read again
CHOICE_ITEMS = 64  # items whose log-likelihoods are written together
BEGINNING = 400  # characters that all prompts of a task begin with, for it to go through alone
ALONE = 8  # items of a task for that; fewer fill no batch

Row = tuple[list[int], list[int], list[int]]  # ids, segments, positions
Tree = tuple[list[int], list[list[int]], Any]  # context ids, its continuations, who asked


def tree_row(context: list[int], continuations: list[list[int]]) -> Row:
    """A context and its continuations side by side, less their last: ids, segments, positions."""
    ids, segments = list(context), [0] * len(context)
    positions = list(range(len(context)))
    for number, tokens in enumerate(continuations, 1):
        own = len(tokens) - 1
        ids += tokens[:-1]
        segments += [number] * own
        positions += range(len(context), len(context) + own)
    return ids, segments, positions


def wanted_slots(
    context: int, continuations: list[list[int]]
) -> Iterator[tuple[list[int], list[int]]]:
    """The slots of such a row whose next tokens are each continuation's, and those tokens."""
    start = context
    for tokens in continuations:
        own = range(start, start + len(tokens) - 1)
        yield [context - 1, *own][: len(tokens)], tokens
        start += len(own)


def tree_size(tree: Tree) -> int:
    """Tokens of the row that a tree becomes."""
    return len(tree[0]) + sum(max(0, len(tokens) - 1) for tokens in tree[1])


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in order of length, so many together that padded rows stay within a token budget."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def alike(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices in order of length, at most `most` together, none shorter than two thirds of the
    longest: padding is read for nothing."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if group and (len(group) == most or lengths[index] * 3 < lengths[group[0]] * 2):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def filled(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices in order, as many together as keep to `most`; at least one."""
    some: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if some and total + size > most:
            yield some
            some, total = [], 0
        some.append(index)
        total += size
    if some:
        yield some


def item_batches(items: Sequence[Any], generate_rows: int) -> Iterator[list[Any]]:
    """Items (`evaluate.Item`) of one kind and like length together.

    A task whose prompts begin alike goes by itself, so that they are read once.
    """
    together: dict[tuple[str, str], list[Any]] = {}
    for item in items:
        together.setdefault((item.requests[0].request_type, item.task), []).append(item)
    groups: dict[tuple[str, str], list[Any]] = {}
    for (kind, task), some in together.items():
        alike = os.path.commonprefix([str(item.requests[0].args[0]) for item in some])
        alone = len(some) >= ALONE and len(alike) >= BEGINNING
        groups.setdefault((kind, task if alone else ""), []).extend(some)
    for (kind, _), group in groups.items():
        size = generate_rows if kind == "generate_until" else CHOICE_ITEMS
        group = sorted(group, key=lambda item: -sum(len(str(r.args)) for r in item.requests))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def beginnings(contexts: Sequence[Sequence[int]]) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """Groups of contexts that begin alike, with the length of what they share; and the rest.

    Contexts in dictionary order are cut wherever neighbours share little, or much less than their
    own neighbours do. At least one token of every context stays outside what is shared.
    """
    order = sorted(range(len(contexts)), key=lambda i: list(contexts[i]))
    common = [_common(contexts[a], contexts[b]) for a, b in zip(order, order[1:], strict=False)]
    groups: list[tuple[int, list[int]]] = []
    rest: list[int] = []
    start = 0
    for at in range(len(order)):
        if at < len(common):
            nearby = max(common[max(0, at - 1) : at + 2])
            if common[at] >= SHARED and 2 * common[at] >= nearby:
                continue
        members = order[start : at + 1]
        shared = min([len(contexts[i]) - 1 for i in members] + common[start:at])
        if len(members) > 1 and shared >= SHARED:
            groups.append((shared, sorted(members)))
        else:
            rest += members
        start = at + 1
    return groups, sorted(rest)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # the equal part of two slices is found by halving, at the speed of a compare
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
