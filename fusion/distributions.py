"""A source's next-token distributions over the blocks, stored once in its own vocabulary.

For every position the K likeliest next tokens with natural log-probabilities under the full
softmax, the log of the mass outside them, and the log-probability of the token that came. The store
is source-native: any target, vocabulary map or fusion function can read it. One binary shard a
block, memory-mapped; `index.jsonl` names each with its checksum and is appended after the shard is
on disk, so an interrupted capture loses at most the block at hand.

Shapes: S source positions of a block, K kept entries, U source vocabulary, D hidden width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fusion.corpus import Piece
from fusion.errors import RunError
from fusion.models import begins_with_bos, causal_pattern, hidden_states, logits
from fusion.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_CHUNK = 256  # positions through the output head at once


@dataclass(frozen=True, slots=True)
class Distribution:
    """What one source predicts in one block; row s describes the token after source position s.

    pieces (S,): which piece of the block. ends (S,): bytes of that piece read so far.
    ids, logprobs (S, K): likeliest first. log_tail, gold_logprob (S,): nats; gold is NaN at the
    last position of a piece, where nothing follows.
    """

    pieces: np.ndarray
    ends: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    log_tail: np.ndarray
    gold_logprob: np.ndarray


def _record(k: int) -> np.dtype:
    return np.dtype(
        [
            ("piece", "<u2"),
            ("end", "<u4"),
            ("ids", "<u4", (k,)),
            ("logprobs", "<f4", (k,)),
            ("log_tail", "<f4"),
            ("gold_logprob", "<f4"),
        ]
    )


class Store:
    """Random access to the distributions of one source, by block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = json.loads((path / "header.json").read_text())
        self.index = _read_index(path)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, block: int) -> Distribution:
        """The distribution of one block; RunError if its shard is missing or damaged."""
        entry = self.index[block]
        file = self.path / entry["shard"]
        if not file.exists() or file.stat().st_size != entry["bytes"]:
            raise RunError(f"{file}: missing or cut short; delete {self.path} and run again")
        rows = np.memmap(file, dtype=_record(self.header["k"]), mode="r")
        if hashlib.sha256(rows.data).hexdigest() != entry["sha256"]:
            raise RunError(f"{file}: checksum differs; delete {self.path} and run again")
        return Distribution(
            np.array(rows["piece"], dtype=np.int64),
            np.array(rows["end"], dtype=np.int64),
            np.array(rows["ids"], dtype=np.int64),
            np.array(rows["logprobs"], dtype=np.float64),
            np.array(rows["log_tail"], dtype=np.float64),
            np.array(rows["gold_logprob"], dtype=np.float64),
        )


def open_store(path: str | Path) -> Store:
    """The store in a folder; RunError if it is none."""
    path = Path(path)
    if not (path / "header.json").exists():
        raise RunError(f"{path}: holds no distributions (header.json is missing)")
    return Store(path)


def _read_index(path: Path) -> list[dict]:
    entries = []
    if (path / "index.jsonl").exists():
        for line in (path / "index.jsonl").read_text().splitlines():
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
) -> Store:
    """Write what `model` predicts in every block to `path`, going on where a former call stopped.

    header: facts that identify the store (model, corpus, dtype); k is added.
    progress: told the number of finished blocks.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "header.json").write_text(json.dumps(header | {"k": k}))
    done = _read_index(path)
    with (path / "index.jsonl").open("w") as index:
        for entry in done:
            index.write(json.dumps(entry) + "\n")
        for number in range(len(done), len(blocks)):
            progress(number)
            rows = _capture_block(model, tokenizer, blocks[number], k)
            shard = f"shard-{number:05d}.bin"
            (path / shard).write_bytes(rows.tobytes())
            digest = hashlib.sha256(rows.tobytes()).hexdigest()
            entry = {"shard": shard, "bytes": rows.nbytes, "positions": len(rows), "sha256": digest}
            index.write(json.dumps(entry) + "\n")
            index.flush()
    progress(len(blocks))
    return Store(path)


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


def _capture_block(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, block: Sequence[Piece], k: int
) -> np.ndarray:
    read = [read_piece(tokenizer, piece) for piece in block]
    ids = torch.from_numpy(np.concatenate([r[0] for r in read]))[None]
    segments = torch.cat([torch.full((len(r[0]),), i + 1) for i, r in enumerate(read)])[None]
    positions = torch.cat([torch.arange(len(r[0])) for r in read])[None]
    device = model.device
    ids, segments, positions = ids.to(device), segments.to(device), positions.to(device)
    pattern = causal_pattern(segments, torch.ones_like(segments, dtype=torch.bool))
    following = torch.roll(ids[0], -1)
    last = torch.roll(segments[0], -1) != segments[0]
    last[-1] = True
    rows = np.zeros(ids.shape[1], dtype=_record(k))
    rows["piece"] = segments[0].cpu().numpy() - 1
    rows["end"] = np.concatenate([r[1] for r in read])
    with torch.inference_mode():
        hidden = hidden_states(model, ids, positions, pattern)[0]
        for start in range(0, len(hidden), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            scores = logits(model, hidden[part])
            norm = torch.logsumexp(scores, dim=-1, keepdim=True)
            top = torch.topk(scores, k, dim=-1)
            logprobs = (top.values - norm).double()
            # 1 − Σp in double: near certainty the difference is far below float32's step at 1.
            tail = torch.log((1 - logprobs.exp().sum(-1)).clamp_min(1e-12))
            gold = scores.gather(1, following[part, None])[:, 0] - norm[:, 0]
            rows["ids"][part] = top.indices.cpu().numpy()
            rows["logprobs"][part] = logprobs.cpu().numpy()
            rows["log_tail"][part] = tail.cpu().numpy()
            rows["gold_logprob"][part] = gold.masked_fill(last[part], float("nan")).cpu().numpy()
    return rows
