"""One corpus, packed once: the same blocks for every trained row, in an order of each seed's own.

A block holds pieces, each a run of one document's text that fits, or a conversation as a chat
template writes it (`conversations.py`); pieces never share context, so a source that reads a piece
alone sees exactly what the target sees. Blocks are cut by the target's
tokenizer and keep the text, so that any source can read the same bytes.

Shapes: T positions of a block.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion.conversations import (
    SEPARATOR,
    Message,
    answers,
    borrowed,
    cut,
    end_of_turn,
    frame,
    learned,
    messages_of,
    read,
    shared_text,
)
from fusion.errors import RunError
from fusion.models import begins_with_bos
from fusion.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Content = str | tuple[Message, ...]  # a text, or a conversation
SMALLEST_PIECE = 16  # tokens; what is left of a block below this stays empty

_SCHEMA = pa.schema(
    [
        ("block", pa.int32()),
        ("document", pa.int32()),
        ("domain", pa.string()),
        ("text", pa.string()),
        ("ends_document", pa.bool_()),
        ("ids", pa.list_(pa.int32())),
        ("ends", pa.list_(pa.int32())),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("frame", pa.list_(pa.string())),
        ("end", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of one document inside a block, as the target reads it.

    ids (T,), ends (T,): target tokens and their cumulative byte ends in `text`; BOS (end 0) in
    front if the tokenizer wants it, EOS behind (end len(text)) if the document ends here.

    Of a conversation: text is what all readers share, the answers; ids are all that the target's
    chat template writes, ends −1 where that is no answer. messages, the template's frame, and the
    end of a turn are what sources read it by.
    """

    document: int
    domain: str
    text: str
    ends_document: bool
    ids: np.ndarray
    ends: np.ndarray
    messages: tuple[Message, ...] = ()
    frame: tuple[str, ...] = ()
    end: str = ""

    @property
    def learned(self) -> np.ndarray:
        """Which tokens (T,) carry loss where they are predicted: of a conversation the answers."""
        return learned(self.ends) if self.messages else np.ones(len(self.ids), dtype=bool)


def read_documents(path: Path, heldout: bool = False) -> list[tuple[str, Content]]:
    """(domain, content) of every document in a file, or a folder of them.

    Files are .jsonl, .json (a list of objects) or .txt, each perhaps .gz. An object holds `text` or
    a conversation (`conversations.messages_of`) and perhaps `domain`; a text file is one document;
    the domain is else the file's name. heldout: of a file in a folder below `path`, the name of
    that folder. Raises RunError naming file and line.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [f for f in files if f.name.removesuffix(".gz").endswith((".jsonl", ".json", ".txt"))]
    key = "heldout" if heldout else "path"
    if not files:
        what = "is no" if path.is_file() else "holds no"
        raise RunError(f"corpus.{key}: {path} {what} .jsonl, .json or .txt file (each may be .gz)")
    out: list[tuple[str, Content]] = []
    for file in files:
        inside = file.relative_to(path).parts if heldout and path.is_dir() else ()
        name = inside[0] if len(inside) > 1 else file.name.split(".")[0]
        out += list(_read_file(file, name))
    if not any(plain(content) for _, content in out):
        raise RunError(f"corpus.{key}: {path} holds no text")
    return out


def _read_file(file: Path, name: str) -> Iterator[tuple[str, Content]]:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            if ".txt" in file.suffixes:
                yield name, lines.read()
                return
            for number, row in _rows(file, lines):
                content = content_of(row) if isinstance(row, dict) else None
                if content is None:
                    raise RunError(
                        f"{file}:{number}: an entry must be an object with a 'text' string, "
                        "'messages' (a list of objects with role and content), or 'instruction' "
                        "and 'output'"
                    )
                try:
                    plain(content).encode()
                except UnicodeEncodeError as error:
                    half = f"\\u{ord(error.object[error.start]):04x}"
                    raise RunError(
                        f"{file}:{number}: {half} is half a character; mend or drop the entry"
                    ) from error
                yield str(row.get("domain", name)), content
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise RunError(f"{file}: not readable ({error}); is it whole, and UTF-8?") from error


def _rows(file: Path, lines: TextIO) -> Iterator[tuple[int, Any]]:
    """Entries with the number of their line, or in a .json file their place in its list."""
    if ".json" not in file.suffixes:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise RunError(f"{file}:{number}: not JSON ({error}); is it whole?") from error
        return
    rows = json.load(lines)
    if not isinstance(rows, list):
        raise RunError(f"{file}: a .json file must be a list of objects; one a line is .jsonl")
    yield from enumerate(rows, 1)


def content_of(row: Mapping[str, Any]) -> Content | None:
    """A row's text or conversation; None if it has neither."""
    text = row.get("text")
    return text if isinstance(text, str) else messages_of(row)


def plain(content: Content) -> str:
    """A document as text; of a conversation what is said, a blank line between turns."""
    return content if isinstance(content, str) else SEPARATOR.join(text for _, text in content)


def of_domains(
    documents: Sequence[tuple[str, Content]], wanted: Sequence[str]
) -> list[tuple[str, Content]]:
    """The documents of these domains; RunError if there is none of one, naming those there are."""
    there = sorted({domain for domain, _ in documents})
    absent = [domain for domain in wanted if domain not in there]
    if absent:
        raise RunError(
            f"corpus: no document of domain {', '.join(absent)}; its domains: {', '.join(there)}"
        )
    return [(domain, text) for domain, text in documents if domain in wanted]


def pack(
    documents: Sequence[tuple[str, Content]],
    tokenizer: PreTrainedTokenizerBase,
    block_tokens: int,
    tokens: int,
    seed: int,
    counts: Counter[str] | None = None,
) -> list[list[Piece]]:
    """Blocks of at most `block_tokens` target tokens, `tokens` in all, from shuffled documents.

    Domains get equal shares, so that a small budget still holds each of them. A text goes on in the
    next block; a conversation stays together, cut only if a whole block is too short for it, and
    left out if no answer would be left or the template refuses it. counts: gets how many were read,
    cut and left out. RunError if the documents run out first.
    """
    counts = Counter() if counts is None else counts
    wanted = max(1, tokens // block_tokens)
    generator = np.random.default_rng(seed)
    queues: dict[str, list[tuple[int, Content]]] = {}
    for index in generator.permutation(len(documents)):
        domain, content = documents[index]
        queues.setdefault(domain, []).append((int(index), content))
    taken = dict.fromkeys(sorted(queues), 0)
    blocks: list[list[Piece]] = []
    current: list[Piece] = []
    room = block_tokens
    while any(queues.values()):
        # The domain that has given least is next, and no document gives more than a block at once.
        domain = min((d for d in taken if queues[d]), key=lambda d: taken[d])
        document, content = queues[domain].pop(0)
        if isinstance(content, str):
            piece = _piece(document, domain, content, tokenizer, room)
            if piece and not piece.ends_document:
                queues[domain].append((document, content[len(piece.text) :]))
        else:
            piece = _conversation(document, domain, content, tokenizer, block_tokens, counts)
        if piece is None:
            continue
        if len(piece.ids) > room:
            blocks.append(current)
            current, room = [], block_tokens
            if len(blocks) == wanted:
                return blocks
        current.append(piece)
        taken[domain] += len(piece.ids)
        room -= len(piece.ids)
        if room < SMALLEST_PIECE:
            blocks.append(current)
            current, room = [], block_tokens
            if len(blocks) == wanted:
                return blocks
    found = sum(len(p.ids) for block in [*blocks, current] for p in block)
    left = counts["left_out"]
    refused = (
        f"; {left} conversations are left out: the tokenizer's chat template refuses them, or no "
        f"answer fits in a block of {block_tokens} tokens"
    )
    raise RunError(
        f"corpus: {wanted * block_tokens} tokens asked for, its {len(documents)} documents give "
        f"{found}; lower corpus.tokens or give more text{refused if left else ''}"
    )


def _piece(
    document: int, domain: str, text: str, tokenizer: PreTrainedTokenizerBase, room: int
) -> Piece | None:
    """As much of a text's beginning as fits; None if there is nothing left in it."""
    bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    capacity = room - len(bos) - len(eos)
    if not text or text.isspace():
        return None
    window = text[: capacity * 16]  # enough for any tokenizer that is worth its name
    tokens = tokenize(tokenizer, window)
    whole = len(tokens.ids) <= capacity and len(window) == len(text)
    count = len(tokens.ids) if whole else _last_clean_cut(tokens.ends, window, capacity)
    end = int(tokens.ends[count - 1]) if count else 0
    kept = window.encode()[:end].decode()
    if not kept:
        return None
    ids = [*bos, *tokens.ids[:count].tolist(), *(eos if whole else [])]
    ends = [*([0] * len(bos)), *tokens.ends[:count].tolist(), *([end] * len(eos) if whole else [])]
    return Piece(document, domain, kept, whole, np.array(ids), np.array(ends))


def _conversation(
    document: int,
    domain: str,
    messages: tuple[Message, ...],
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    counts: Counter[str],
) -> Piece | None:
    """A conversation, or as much of its beginning as a block holds; None if no answer is left."""
    counts["conversations"] += 1
    found = cut(tokenizer, messages, room)
    if found is None:
        counts["left_out"] += 1
        return None
    kept, whole = found
    counts["cut"] += len(kept) < len(messages) or not whole
    parts = frame(tokenizer, kept)
    assert parts
    ids, ends = read(tokenizer, parts, answers(kept), whole)
    end = end_of_turn(tokenizer, parts)
    # A reader that wants BOS has its own.
    bos = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""
    lent = [parts[0].removeprefix(bos), *parts[1:]]
    text = shared_text(kept) if whole else shared_text(kept).removesuffix(SEPARATOR)
    return Piece(document, domain, text, whole, ids, ends, tuple(kept), tuple(lent), end)


def _last_clean_cut(ends: np.ndarray, text: str, capacity: int) -> int:
    """The most tokens within capacity that end at a character's end."""
    raw = text.encode()
    count = min(capacity, len(ends))
    while count > 0 and ends[count - 1] < len(raw) and raw[ends[count - 1]] & 0xC0 == 0x80:
        count -= 1
    return count


def read_piece(
    tokenizer: PreTrainedTokenizerBase, piece: Piece, template: str = "own"
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and byte ends of a piece as this tokenizer reads it, with its own BOS and EOS.

    template: whose chat template writes a conversation, the tokenizer's `own` or the `pivot`'s,
    which is the target's; that also where its own refuses the conversation.
    """
    if piece.messages:
        own = frame(tokenizer, piece.messages) if template == "own" else None
        parts, front = (own, []) if own else borrowed(tokenizer, piece.frame, piece.end)
        return read(tokenizer, parts, answers(piece.messages), piece.ends_document, front)
    tokens = tokenize(tokenizer, piece.text)
    total = len(piece.text.encode())
    bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    ends_here = piece.ends_document and tokenizer.eos_token_id is not None
    eos = [tokenizer.eos_token_id] if ends_here else []
    ids = np.array([*bos, *tokens.ids.tolist(), *eos], dtype=np.int64)
    ends = np.array([*([0] * len(bos)), *tokens.ends.tolist(), *([total] * len(eos))], np.int64)
    return ids, ends


def drawn_order(blocks: int, seed: int) -> list[int]:
    """Places of the blocks in an order of their own for a seed, the same in every pass."""
    return np.random.default_rng(seed).permutation(blocks).tolist()


def write_blocks(path: Path, blocks: Sequence[Sequence[Piece]]) -> None:
    """Blocks to one Parquet file."""
    rows = [
        {
            "block": number,
            "document": piece.document,
            "domain": piece.domain,
            "text": piece.text,
            "ends_document": piece.ends_document,
            "ids": piece.ids,
            "ends": piece.ends,
            "messages": [{"role": role, "content": text} for role, text in piece.messages],
            "frame": piece.frame,
            "end": piece.end,
        }
        for number, block in enumerate(blocks)
        for piece in block
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path, compression="zstd")


def read_blocks(path: Path) -> list[list[Piece]]:
    """The blocks of `write_blocks`, in order; RunError if the file is missing or damaged."""
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path}: missing or damaged; delete {path.parent} and run again") from error
    blocks: list[list[Piece]] = []
    for row in rows:
        if row["block"] == len(blocks):
            blocks.append([])
        blocks[-1].append(
            Piece(
                row["document"],
                row["domain"],
                row["text"],
                row["ends_document"],
                np.array(row["ids"], dtype=np.int64),
                np.array(row["ends"], dtype=np.int64),
                tuple((m["role"], m["content"]) for m in row["messages"]),
                tuple(row["frame"]),
                row["end"],
            )
        )
    return blocks


def text_bytes(blocks: Iterable[Iterable[Piece]]) -> int:
    """UTF-8 bytes of all pieces."""
    return sum(len(piece.text.encode()) for block in blocks for piece in block)
