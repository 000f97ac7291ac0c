"""Whether checkpoints can be merged tensor by tensor: all that differs, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fusion.errors import RunError
from fusion.geometry import EMBEDDINGS

if TYPE_CHECKING:
    from fusion.checkpoints import Checkpoint

FLOATS = ("F64", "F32", "F16", "BF16")  # whatever else is the same in all models, or refused
_HEADS = ("lm_head.weight", "embed_out.weight")


def refuse_mismatches(named: Mapping[str, Checkpoint], config: Mapping[str, Any]) -> None:
    if found := [*_heads(named, config), *mismatches(named)]:
        what = f"{', '.join(named)} cannot be merged tensor by tensor:"
        remedies = "; ".join(dict.fromkeys(remedy for _, remedy in found))
        raise RunError("\n  ".join([what, *(line for line, _ in found)]) + f"\n{remedies}")


def _heads(named: Mapping[str, Checkpoint], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Output heads that some models tie to the embedding and some do not; settles the others.

    Where all tie, the head is stored as in the first model, whose configuration is taken.
    """
    target = next(iter(named.values()))
    for head in _HEADS:
        storing = [name for name, c in named.items() if head in c.files]
        if not storing or (len(storing) == len(named) and not config.get("tie_word_embeddings")):
            continue
        own = [name for name in storing if not named[name].ties(head)]
        if own and (tied := [name for name in named if name not in own]):
            yield (
                f"{head} is a tensor of its own in {', '.join(own)} but the embedding in "
                f"{', '.join(tied)}",
                "merge models that all tie the output head, or untie it in all: set "
                "tie_word_embeddings to false and save with the embedding copied as the head",
            )
            for checkpoint in named.values():
                checkpoint.files.pop(head, None)
        elif not own:
            for checkpoint in named.values():
                if head not in target.files:
                    checkpoint.files.pop(head, None)
                elif head not in checkpoint.files and (embedding := checkpoint.embedding()):
                    checkpoint.files[head] = checkpoint.files[embedding]
                    checkpoint.stored_as[head] = embedding


def mismatches(named: Mapping[str, Checkpoint]) -> list[tuple[str, str]]:
    """Why these checkpoints cannot be merged: (what differs, what to do), against the first one.

    Tensors of all layers that differ alike are one line.
    """
    first_name, first = next(iter(named.items()))
    found: dict[tuple[str, str, str], list[str]] = {}
    for other_name, other in list(named.items())[1:]:
        for tensor in sorted(first.files.keys() | other.files.keys()):
            if difference := _difference(tensor, first, other, first_name, other_name):
                pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor)
                found.setdefault((*difference, pattern), []).append(tensor)
    more = {
        key: f" (and {len(names) - 1} more like it)" * (len(names) > 1)
        for key, names in found.items()
    }
    return [(f"{names[0]} {key[0]}{more[key]}", key[1]) for key, names in found.items()]


def _difference(
    name: str, one: Checkpoint, two: Checkpoint, one_name: str, two_name: str
) -> tuple[str, str] | None:
    """How a tensor differs between two models, without its name, and the remedy."""
    family = "merge models of one architecture and size, trained from one base"
    if name not in one.files or name not in two.files:
        here, there = (one_name, two_name) if name in one.files else (two_name, one_name)
        return f"is in {here} but not in {there}", family
    shapes, codes = (one.shape(name), two.shape(name)), (one.code(name), two.code(name))
    if shapes[0] != shapes[1]:
        vocabulary = "give all models one tokenizer first, and resize their embeddings to it"
        remedy = vocabulary if name.endswith(EMBEDDINGS + _HEADS) else family
        return f"is {shapes[0]} in {one_name} but {shapes[1]} in {two_name}", remedy
    if all(code in FLOATS for code in codes):
        return None
    if codes[0] != codes[1]:
        line = f"is {codes[0]} in {one_name} but {codes[1]} in {two_name}"
    elif one.read(name).equal(two.read(name)):
        return None
    else:
        line = f"holds {codes[0]} that differ between {one_name} and {two_name}"
    return line, "only floating-point tensors can be merged: undo quantization first"
