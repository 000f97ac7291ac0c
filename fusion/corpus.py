"""One corpus, packed once: the same blocks, order and seed for every trained row.

A block holds pieces, each a run of one document's text that fits; pieces never share context, so a
source that reads a piece alone sees exactly what the target sees. Blocks are cut by the target's
tokenizer and keep the text, so that any source can read the same bytes.

Shapes: T positions of a block.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion.errors import RunError
from fusion.models import begins_with_bos
from fusion.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    ]
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of one document inside a block, as the target reads it.

    ids (T,), ends (T,): target tokens and their cumulative byte ends in `text`; BOS (end 0) in
    front if the tokenizer wants it, EOS behind (end len(text)) if the document ends here.
    """

    document: int
    domain: str
    text: str
    ends_document: bool
    ids: np.ndarray
    ends: np.ndarray


def read_documents(path: Path) -> list[tuple[str, str]]:
    """(domain, text) of every document in a JSONL or text file (also .gz), or a folder of them.

    A JSONL line holds `text` and perhaps `domain`; a text file is one document; the domain is else
    the file's name. Raises RunError naming file and line.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [f for f in files if f.name.removesuffix(".gz").endswith((".jsonl", ".txt"))]
    if not files:
        raise RunError(f"corpus.path: {path} holds no .jsonl or .txt file (each may be .gz)")
    return [document for file in files for document in _read_file(file)]


def _read_file(file: Path) -> Iterator[tuple[str, str]]:
    name = file.name.split(".")[0]
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            if ".txt" in file.suffixes:
                yield name, lines.read()
                return
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise RunError(
                        f"{file}:{number}: a line must be an object with a 'text' string"
                    )
                yield str(row.get("domain", name)), row["text"]
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise RunError(f"{file}: not readable ({error}); is it whole, and UTF-8?") from error


def of_domains(
    documents: Sequence[tuple[str, str]], wanted: Sequence[str]
) -> list[tuple[str, str]]:
    """The documents of these domains; RunError if there is none of one, naming those there are."""
    there = sorted({domain for domain, _ in documents})
    absent = [domain for domain in wanted if domain not in there]
    if absent:
        raise RunError(
            f"corpus: no document of domain {', '.join(absent)}; its domains: {', '.join(there)}"
        )
    return [(domain, text) for domain, text in documents if domain in wanted]


def pack(
    documents: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    block_tokens: int,
    tokens: int,
    seed: int,
) -> list[list[Piece]]:
    """Blocks of at most `block_tokens` target tokens, `tokens` in all, from shuffled documents.

    Domains get equal shares, so that a small budget still holds each of them. RunError if the
    documents run out first.
    """
    wanted = max(1, tokens // block_tokens)
    generator = np.random.default_rng(seed)
    queues: dict[str, list[tuple[int, str]]] = {}
    for index in generator.permutation(len(documents)):
        domain, text = documents[index]
        queues.setdefault(domain, []).append((int(index), text))
    taken = dict.fromkeys(sorted(queues), 0)
    blocks: list[list[Piece]] = []
    current: list[Piece] = []
    room = block_tokens
    while any(queues.values()):
        # The domain that has given least is next, and no document gives more than a block at once.
        domain = min((d for d in taken if queues[d]), key=lambda d: taken[d])
        document, text = queues[domain].pop(0)
        piece = _piece(document, domain, text, tokenizer, room)
        if piece is None:
            continue
        if not piece.ends_document:
            queues[domain].append((document, text[len(piece.text) :]))
        current.append(piece)
        taken[domain] += len(piece.ids)
        room -= len(piece.ids)
        if room < SMALLEST_PIECE:
            blocks.append(current)
            current, room = [], block_tokens
            if len(blocks) == wanted:
                return blocks
    found = sum(len(p.ids) for block in [*blocks, current] for p in block)
    raise RunError(
        f"corpus: {wanted * block_tokens} tokens asked for, its {len(documents)} documents give "
        f"{found}; lower corpus.tokens or give more text"
    )


def _piece(
    document: int, domain: str, text: str, tokenizer: PreTrainedTokenizerBase, room: int
) -> Piece | None:
    """As much of a text's beginning as fits; None if there is nothing left in it."""
    bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    capacity = room - len(bos) - len(eos)
    window = text[: capacity * 16]  # enough for any tokenizer that is worth its name
    if not window.strip():
        return None
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


def _last_clean_cut(ends: np.ndarray, text: str, capacity: int) -> int:
    """The most tokens within capacity that end at a character's end."""
    raw = text.encode()
    count = min(capacity, len(ends))
    while count > 0 and ends[count - 1] < len(raw) and raw[ends[count - 1]] & 0xC0 == 0x80:
        count -= 1
    return count


def read_piece(tokenizer: PreTrainedTokenizerBase, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and byte ends of a piece as this tokenizer reads it, with its own BOS and EOS."""
    tokens = tokenize(tokenizer, piece.text)
    total = len(piece.text.encode())
    bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    ends_here = piece.ends_document and tokenizer.eos_token_id is not None
    eos = [tokenizer.eos_token_id] if ends_here else []
    ids = np.array([*bos, *tokens.ids.tolist(), *eos], dtype=np.int64)
    ends = np.array([*([0] * len(bos)), *tokens.ends.tolist(), *([total] * len(eos))], np.int64)
    return ids, ends


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
        }
        for number, block in enumerate(blocks)
        for piece in block
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path, compression="zstd")


def read_blocks(path: Path) -> list[list[Piece]]:
    """The blocks of `write_blocks`, in order."""
    blocks: list[list[Piece]] = []
    for row in pq.read_table(path).to_pylist():
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
            )
        )
    return blocks


def text_bytes(blocks: Iterable[Iterable[Piece]]) -> int:
    """UTF-8 bytes of all pieces."""
    return sum(len(piece.text.encode()) for block in blocks for piece in block)
