"""A source's next-token distributions over the blocks, stored once in its own vocabulary.

For every position the K likeliest next tokens with natural log-probabilities under the full
softmax, the log of the mass outside them, and the log-probability of the token that came. The store
is source-native: any target, vocabulary map or fusion function can read it. One shard a block,
written as `fusion.codec` says; `index.jsonl` names each with its checksum and is appended after the
shard is on disk, so an interrupted capture loses at most the block at hand. Several processes may
each write some of the blocks; what they say of a shard lies beside it until it is in the index.

Shapes: S source positions of a block, K kept entries, U source vocabulary, D hidden width.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fusion.codec import CODEC, STEP, Distribution, decode, encode
from fusion.corpus import Piece, read_piece
from fusion.errors import RunError
from fusion.models import (
    HEAD_CHUNK,
    causal_pattern,
    embedding_rows,
    hidden_states,
    in_parts,
    require_fit,
    softcap,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUP = 64


class Store:
    """Random access to the distributions of one source, by block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.header = json.loads((path / "header.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path}/header.json: damaged; delete {path} and run again") from error
        self.index = _read_index(path)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, block: int, pieces: Sequence[Piece] | None = None) -> Distribution:
        """The distribution of one block; RunError if it is missing or damaged.

        pieces: not needed; `Online` asks for them.
        """
        if block >= len(self.index):
            raise RunError(
                f"{self.path / 'index.jsonl'}: ends before block {block}; delete {self.path} "
                "and run again"
            )
        entry = self.index[block]
        file = self.path / entry["shard"]
        if not file.exists() or file.stat().st_size != entry["bytes"]:
            raise RunError(f"{file}: missing or cut short; delete {self.path} and run again")
        with file.open("rb") as shard:
            content = mmap.mmap(shard.fileno(), 0, access=mmap.ACCESS_READ)
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise RunError(f"{file}: checksum differs; delete {self.path} and run again")
        return decode(content, entry["uncompressed"], self.header["vocabulary"])


class Online:
    """A source that is run when asked, in place of a store: the same numbers, nothing on disk."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, k: int, template: str
    ) -> None:
        require_fit(model.config, tokenizer.vocab_size, str(model.name_or_path))
        self.model, self.tokenizer, self.k, self.template = model, tokenizer, k, template

    def read(self, block: int, pieces: Sequence[Piece]) -> Distribution:
        """What the source predicts in these pieces, rounded as a store rounds."""
        vocabulary = embedding_rows(self.model)
        rows = predict(self.model, self.tokenizer, pieces, self.k, self.template)
        return decode(*encode(rows, vocabulary), vocabulary)


def open_store(path: str | Path) -> Store:
    """The store in a folder; RunError if it is none."""
    path = Path(path)
    if not (path / "header.json").exists():
        raise RunError(f"{path}: holds no distributions (header.json is missing)")
    store = Store(path)
    if store.header.get("codec") != CODEC:
        raise RunError(f"{path}: written as {store.header.get('codec')}, not {CODEC}; delete it")
    return store


def _read_index(path: Path) -> list[dict]:
    entries = []
    if (path / "index.jsonl").exists():
        for line in (path / "index.jsonl").read_text(errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line that an interruption cut; its block is redone
    return entries


def capture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[Sequence[Piece]],
    path: Path,
    k: int,
    header: dict,
    progress: Callable[[int], None] = lambda done: None,
    template: str = "own",
) -> Store:
    """Write what `model` predicts in every block to `path`, going on where a former call stopped.

    header: facts that identify the store (model, corpus, dtype); how it is written is added.
    template: as for `corpus.read_piece`.
    progress: told the number of finished blocks.
    """
    write_header(model, path, k, header)
    done = _read_index(path)
    _replace(path / "index.jsonl", "".join(json.dumps(e) + "\n" for e in done).encode())
    with (path / "index.jsonl").open("a") as index:
        for number in range(len(done), len(blocks)):
            progress(number)
            entry = _beside(path, number)
            if entry is None:
                entry = _write(model, tokenizer, blocks[number], path, number, k, template)
            index.write(json.dumps(entry) + "\n")
            index.flush()
    for said in path.glob("shard-*.json"):
        said.unlink()
    progress(len(blocks))
    return Store(path)


def write_header(model: PreTrainedModel, path: Path, k: int, header: dict) -> None:
    """Say in a folder what its shards are of."""
    path.mkdir(parents=True, exist_ok=True)
    written = {"k": k, "codec": CODEC, "step": STEP, "vocabulary": embedding_rows(model)}
    _replace(path / "header.json", json.dumps(header | written).encode())


def capture_block(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block: Sequence[Piece],
    path: Path,
    number: int,
    k: int,
    template: str = "own",
) -> None:
    """Write one block's shard, with its line of the index beside it: `gather` takes it up."""
    entry = _write(model, tokenizer, block, path, number, k, template)
    _replace(path / f"shard-{number:05d}.json", json.dumps(entry).encode())


def missing(path: Path, count: int) -> list[int]:
    """The blocks, of so many, that neither the index nor a line beside a shard has."""
    return [n for n in range(len(_read_index(path)), count) if _beside(path, n) is None]


def gather(path: Path, count: int) -> Store:
    """The store of blocks that were captured one by one, as if one process had captured them all.

    RunError if one is missing.
    """
    absent = missing(path, count)
    if absent:
        raise RunError(f"{path}: blocks {', '.join(map(str, absent))} are missing; run again")
    done = _read_index(path)
    done += [entry for n in range(len(done), count) if (entry := _beside(path, n))]
    _replace(path / "index.jsonl", "".join(json.dumps(e) + "\n" for e in done).encode())
    for said in path.glob("shard-*.json"):
        said.unlink()
    return Store(path)


def _beside(path: Path, number: int) -> dict | None:
    try:
        return dict(json.loads((path / f"shard-{number:05d}.json").read_text()))
    except FileNotFoundError:
        return None


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block: Sequence[Piece],
    path: Path,
    number: int,
    k: int,
    template: str,
) -> dict:
    """Write a block's shard; its line of the index."""
    rows = predict(model, tokenizer, block, k, template)
    shard = f"shard-{number:05d}.bin"
    content, size = encode(rows, embedding_rows(model))
    _replace(path / shard, content)
    return {
        "shard": shard,
        "bytes": len(content),
        "uncompressed": size,
        "positions": len(rows.ids),
        "read": sum(len(read_piece(tokenizer, piece, template)[0]) for piece in block),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _replace(path: Path, content: bytes) -> None:
    """A file, whole or not at all; no two processes write into one another's."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def read_block(
    tokenizer: PreTrainedTokenizerBase,
    block: Sequence[Piece],
    device: torch.device,
    template: str = "own",
) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """A block as one row without padding: ids, segments, positions (1, S), and byte ends (S,)."""
    read = [read_piece(tokenizer, piece, template) for piece in block]
    ids = torch.from_numpy(np.concatenate([r[0] for r in read]))[None]
    segments = torch.cat([torch.full((len(r[0]),), i + 1) for i, r in enumerate(read)])[None]
    positions = torch.cat([torch.arange(len(r[0])) for r in read])[None]
    ends = np.concatenate([r[1] for r in read])
    return ids.to(device), segments.to(device), positions.to(device), ends


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block: Sequence[Piece],
    k: int,
    template: str = "own",
) -> Distribution:
    """What `model` predicts in one block, unrounded; pieces do not see each other.

    Of a conversation only the rows that have a place in the shared text (byte end ≥ 0).
    """
    ids, segments, positions, ends = read_block(tokenizer, block, model.device, template)
    pattern = causal_pattern(segments, torch.ones_like(segments, dtype=torch.bool))
    following = torch.roll(ids[0], -1)
    placed = torch.from_numpy(ends >= 0).to(model.device)
    # A row says nothing that counts at the end of a piece or of a turn.
    last = (torch.roll(segments[0], -1) != segments[0]) | ~torch.roll(placed, -1)
    last[-1] = True
    following, last, pieces = following[placed], last[placed], segments[0][placed]
    found: list[tuple[Tensor, ...]] = []
    head = model.get_output_embeddings()
    with torch.inference_mode():
        hidden = hidden_states(model, ids, positions, pattern)[0][placed]
        for start in range(0, len(hidden), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            scores = head(hidden[part])
            found += _kept(scores, following[part], k, softcap(model))
    columns = [torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)]
    columns[-1][last.cpu().numpy()] = np.nan
    return Distribution(pieces.cpu().numpy() - 1, ends[ends >= 0], *columns)


def _kept(
    scores_NV: Tensor, following_N: Tensor, k: int, cap: float | None
) -> list[tuple[Tensor, ...]]:
    """Top-k ids and log-probabilities, log tail mass and the next token's log-probability.

    scores_NV is written over.
    """
    found: list[tuple[Tensor, ...]] = []
    for rows, z in in_parts(scores_NV, cap):
        gold = z.gather(1, following_N[rows, None])
        values, ids = largest(z, k)
        most = values[:, :1]
        norm = z.sub_(most).exp_().sum(dim=-1, keepdim=True).log_() + most
        logprobs = (values - norm).double()
        # 1 − Σp in double: near certainty the difference is far below float32's step at 1.
        tail = torch.log((1 - logprobs.exp().sum(-1)).clamp_min(1e-12))
        found.append((ids, logprobs, tail, (gold - norm)[:, 0].double()))
    return found


def largest(scores_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their indices, as `torch.topk`, in a quarter of its time.

    They lie in the k groups of neighbours whose own largest are largest.
    """
    count, width = scores_NV.shape
    if width < GROUP * 2 * k:
        found = torch.topk(scores_NV, k, dim=-1)
        return found.values, found.indices
    rest = width % GROUP
    whole = scores_NV[:, : width - rest].unflatten(1, (-1, GROUP))
    groups = whole.amax(-1).topk(k, dim=-1).indices
    among = whole.gather(1, groups[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    at = (groups[:, :, None] * GROUP + torch.arange(GROUP, device=groups.device)).flatten(1)
    if rest:
        last = torch.arange(width - rest, width, device=groups.device).expand(count, -1)
        among, at = torch.cat([among, scores_NV[:, -rest:]], 1), torch.cat([at, last], 1)
    found = torch.topk(among, k, dim=-1)
    return found.values, at.gather(1, found.indices)
