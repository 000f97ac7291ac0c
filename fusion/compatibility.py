"""Whether checkpoints can be merged tensor by tensor: all that differs, and what to do about it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import RunError
from fusion.geometry import EMBEDDINGS

if TYPE_CHECKING:
    from fusion.checkpoints import Checkpoint

FLOATS = ("F64", "F32", "F16", "BF16")  # whatever else is the same in all models, or refused
_HEADS = ("lm_head.weight", "embed_out.weight")
# Of a configuration: what gives the same tensors another meaning, and what is judged elsewhere.
_MEANING = "model_type num_attention_heads num_key_value_heads head_dim hidden_act"
_MEANING += " hidden_activation"
_ELSEWHERE = "dtype torch_dtype transformers_version _name_or_path vocab_size use_cache"
_ELSEWHERE += " architectures tie_word_embeddings bos_token_id eos_token_id pad_token_id"


def pad_vocabulary(named: Mapping[str, Checkpoint], pad: str) -> dict[str, int]:
    """Give embeddings and heads of all models one number of rows; what changes in a configuration.

    `pad`: trim to the smallest, or extend to the largest. Raises RunError where trimming would
    cut off rows that the first model's tokenizer uses.
    """
    every = list(named.values())
    names = sorted({n for c in every for n in c.files if n.endswith(EMBEDDINGS + _HEADS)})
    changed: dict[str, int] = {}
    for name in names:
        holding = [c for c in every if name in c.files]
        sizes = [c.stored(name)[0] for c in holding]
        if len(set(sizes)) == 1:
            continue
        rows = min(sizes) if pad == "trim" else max(sizes)
        used = max(vocabulary(every[0].folder).values(), default=-1) + 1
        if used > rows:
            raise RunError(
                f"{name} would be cut to {rows} rows, but the tokenizer of {next(iter(named))} "
                f"uses {used}; set pad: extend"
            )
        for checkpoint in holding:
            checkpoint.rows[name], checkpoint.donors = rows, every
        changed["vocab_size"] = rows
    return changed


def vocabulary(folder: Path) -> dict[str, int]:
    """Token to id of a folder's tokenizer.json, with its added tokens; empty if there is none."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        what = f"{folder / 'tokenizer.json'}: is not JSON ({error}); fetch it again"
        raise RunError(what) from error
    tokens = (content.get("model") or {}).get("vocab") or {}
    if isinstance(tokens, list):  # Unigram: (token, score) in the order of ids
        tokens = {token: place for place, (token, _) in enumerate(tokens)}
    return tokens | {added["content"]: added["id"] for added in content.get("added_tokens") or ()}


def _tokenizers(named: Mapping[str, Checkpoint]) -> Iterator[tuple[str, str]]:
    """Tokens that have another id in another model, against the first."""
    (first, checkpoint), *others = named.items()
    own = vocabulary(checkpoint.folder)
    for other, theirs in others:
        ids = vocabulary(theirs.folder)
        moved = sorted((i, token) for token, i in own.items() if ids.get(token, i) != i)
        if moved:
            at, token = moved[0]
            more = f" (and {len(moved) - 1} more tokens)" * (len(moved) > 1)
            yield (
                f"tokenizer.json: {token!r} is {at} in {first} but {ids[token]} in {other}{more}",
                "a row of an embedding must mean one token: merge models of one tokenizer",
            )


def _configurations(named: Mapping[str, Checkpoint]) -> Iterator[tuple[str, bool]]:
    """What other configurations say otherwise than the first, where; and whether that hinders."""
    (first, origin), *others = named.items()
    own = _configuration(origin.folder)
    for other, checkpoint in others:
        theirs = _configuration(checkpoint.folder)
        for key in sorted(own.keys() & theirs.keys() - set(_ELSEWHERE.split())):
            if own[key] != theirs[key]:
                line = f"config.json: {key} is {own[key]} in {first} but {theirs[key]} in {other}"
                yield line, key in _MEANING.split()


def _configuration(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        what = f"{folder / 'config.json'}: is not JSON ({error}); fetch it again"
        raise RunError(what) from error


def differences(named: Mapping[str, Checkpoint]) -> list[str]:
    """What differs and does not hinder: stored type, chat template, further configuration."""
    (first, origin), *others = named.items()
    notes = []
    types = {name: _type(checkpoint) for name, checkpoint in named.items()}
    if len(set(types.values())) > 1:
        listed = ", ".join(f"{code} in {name}" for name, code in types.items())
        notes.append(f"stored type: {listed}; merged in float32")
    template = chat_template(origin.folder)
    for name, checkpoint in others:
        if (theirs := chat_template(checkpoint.folder)) != template:
            how = "has none" if theirs is None else "is another"
            notes.append(f"chat template: that of {first} is kept; {name} {how}")
    said = _configurations(named)
    notes += [f"{line}; the first is kept" for line, hinders in said if not hinders]
    return notes


def _type(checkpoint: Checkpoint) -> str:
    return "+".join(sorted({c for n in checkpoint.files if (c := checkpoint.code(n)) in FLOATS}))


def chat_template(folder: Path) -> str | None:
    """The chat template of a folder, from its file or its tokenizer's configuration."""
    if (file := folder / "chat_template.jinja").exists():
        return file.read_text()
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    except (FileNotFoundError, ValueError):
        return None
    return None if found is None else json.dumps(found) if not isinstance(found, str) else found


def refuse_mismatches(named: Mapping[str, Checkpoint], config: Mapping[str, Any]) -> None:
    family = "merge models of one architecture and size, trained from one base"
    meant = [(line, family) for line, hinders in _configurations(named) if hinders]
    if found := [*_heads(named, config), *_tokenizers(named), *meant, *mismatches(named)]:
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
        sizes = "set pad: trim (keep the rows that all have) or pad: extend (fill in missing rows)"
        remedy = sizes if name.endswith(EMBEDDINGS + _HEADS) else family
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
