"""Tokens as bytes: any fast tokenizer's ids with cumulative byte ends over the original text.

Bytes are the one thing that all tokenizers share. A token's end is where, in the UTF-8 bytes of the
text, what it stands for ends; it may lie inside a character (byte tokens) and two tokens may end at
the same place (the dummy space some SentencePiece models put in front). Where a tokenizer changes
the text (lowercasing, NFKC), its character offsets give the span; where they do not tile the text,
the span is marked, never guessed.

Shapes: T tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
ROLES = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
_SPACE = "\u2581"  # SentencePiece's visible space


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, to the byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


_ALPHABET = _byte_alphabet()
_TABLES: WeakKeyDictionary[PreTrainedTokenizerBase, list[bytes | None]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as one tokenizer reads it.

    ids (T,); ends (T,): cumulative byte ends, non-decreasing; special (T,): control tokens written
    out in the text; marked (T,): the span is not exactly known.
    """

    ids: np.ndarray
    ends: np.ndarray
    special: np.ndarray
    marked: np.ndarray


def family(tokenizer: PreTrainedTokenizerBase) -> str:
    """How token strings stand for bytes: byte_level, sentencepiece, wordpiece or other."""
    decoder = repr(tokenizer.backend_tokenizer.decoder)
    if "ByteLevel" in decoder:
        return "byte_level"
    if "WordPiece" in decoder:
        return "wordpiece"
    if "Metaspace" in decoder or "ByteFallback" in decoder or _SPACE in decoder:
        return "sentencepiece"
    return "other"


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer is: the hash of its vocabulary, rules and roles, whatever its model."""
    roles = {role: getattr(tokenizer, role) for role in ROLES}
    content = tokenizer.backend_tokenizer.to_str() + json.dumps(roles)
    return hashlib.sha256(content.encode()).hexdigest()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes each id stands for; None for special tokens and unused ids.

    A WordPiece token that starts a word has a space in front, one that goes on has none.
    """
    table = _TABLES.get(tokenizer)
    if table is None:
        kind = family(tokenizer)
        vocabulary = tokenizer.get_vocab()
        table = [None] * (max(vocabulary.values(), default=-1) + 1)
        added = tokenizer.added_tokens_decoder
        for string, index in vocabulary.items():
            if index in added:
                table[index] = None if added[index].special else string.encode()
            else:
                table[index] = _bytes(string, kind)
        for index in tokenizer.all_special_ids:
            if index < len(table):
                table[index] = None
        _TABLES[tokenizer] = table
    return table


def _bytes(string: str, kind: str) -> bytes | None:
    if kind == "byte_level":
        if all(c in _ALPHABET for c in string):
            return bytes(_ALPHABET[c] for c in string)
        return string.encode()
    if kind == "wordpiece":
        return string[2:].encode() if string.startswith("##") else b" " + string.encode()
    found = _BYTE_TOKEN.fullmatch(string)
    if found:
        return bytes([int(found[1], 16)])
    return string.replace(_SPACE, " ").encode()


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False
) -> Tokens:
    """A text's tokens with their byte ends.

    Special tokens that the tokenizer adds (with add_special_tokens) have no width.
    """
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
    ids = np.array(encoding.ids, dtype=np.int64)
    table = token_bytes(tokenizer)
    specials = set(tokenizer.all_special_ids)
    special = np.array([index in specials for index in encoding.ids], dtype=bool)
    ends, marked = _walk(text, encoding, table, family(tokenizer) != "wordpiece")
    return Tokens(ids, ends, special, marked)


def _walk(
    text: str, encoding: object, table: list[bytes | None], by_bytes: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Follow the tokens along the text's bytes; offsets where a token is not what stands there."""
    raw = text.encode()
    ids, offsets = encoding.ids, encoding.offsets  # type: ignore[attr-defined]
    at_char: np.ndarray | None = None
    ends = np.zeros(len(ids), dtype=np.int64)
    marked = np.zeros(len(ids), dtype=bool)
    position = 0
    for number, index in enumerate(ids):
        known = table[index] if by_bytes and index < len(table) else None
        reached = None
        if known is not None:
            reached = _reach(raw, position, known)
            if reached is None and known[:1] == b" ":
                reached = _reach(raw, position, known[1:])  # the dummy prefix, not in the text
        if reached is not None:
            position = reached
        else:
            if at_char is None:
                widths = [len(c.encode()) for c in text]
                at_char = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
            start, end = (int(at_char[o]) for o in offsets[number])
            last = number + 1 == len(ids)
            # Overlapping or empty offsets, or a text that ends elsewhere: not exactly known.
            marked[number] = (
                (end <= position and end > start)
                or (by_bytes and known is not None)
                or (last and end != len(raw))
            )
            position = max(position, end)
        ends[number] = position
    if len(ids) and position != len(raw):
        marked[-1] = True
    return ends, marked


def _reach(raw: bytes, position: int, known: bytes) -> int | None:
    """Where `known` ends in the text if it stands there; its space may be a visible one."""
    if raw.startswith(known, position):
        return position + len(known)
    visible = _SPACE.encode()
    if b" " not in known or not raw.startswith((visible, known[:1]), position):
        return None
    for byte in known:
        if byte == 32 and raw.startswith(visible, position):
            position += len(visible)
        elif position < len(raw) and raw[position] == byte:
            position += 1
        else:
            return None
    return position
