"""What goes through a model together: batches by length, and contexts that begin alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

SHARED = 64  # tokens; a common beginning shorter than this is read again


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
    """Indices in order of length, at most `most` together, none shorter than half the longest."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if group and (len(group) == most or lengths[index] * 2 < lengths[group[0]]):
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
