"""What training is drawn to: the fused targets of a block, made as they are asked for.

Shapes: T target positions, K kept entries, M sources, C chunks of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusion.aligned import Aligned, dtw_pairs
from fusion.codec import Distribution
from fusion.corpus import Piece, read_blocks
from fusion.distributions import Online, Store, open_store
from fusion.functions import fused_block, softmax
from fusion.measures import bits_per_byte, chunks
from fusion.models import load_model, load_tokenizer
from fusion.spec import Fuse
from fusion.vocabulary import load_map


class FusedTargets:
    """The sources of one fusion, from their stores or run on the spot, and what they come to.

    sources: for each its `model` folder and `map` file, and its `store` or, online, the `dtype` it
    runs in. target: the model folder whose tokenizer cut the blocks.
    """

    def __init__(
        self, fuse: Fuse, sources: Sequence[dict[str, str]], target: str, device: str
    ) -> None:
        self.fuse = fuse
        self.maps = [load_map(source["map"]) for source in sources]
        self.stores: list[Store | Online] = [
            Online(
                load_model(s["model"], s["dtype"], device),
                load_tokenizer(s["model"]),
                fuse.top_k,
                fuse.template,
            )
            if fuse.online
            else open_store(s["store"])
            for s in sources
        ]
        self.tokenizers = None
        if fuse.alignment == "dtw":
            self.tokenizers = load_tokenizer(target), [load_tokenizer(s["model"]) for s in sources]

    def row(
        self, index: int, block: Sequence[Piece], labelled: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The fused targets of one block as arrays; labelled (T,): which positions count."""
        sources = [store.read(index, block) for store in self.stores]
        if self.fuse.objective == "alm":
            return _chunked(self.fuse, sources, block, labelled)
        pairs = None
        if self.tokenizers:
            target, own = self.tokenizers
            read = zip(own, self.maps, strict=True)
            pairs = [
                dtw_pairs(block, tokenizer, target, a, self.fuse.template) for tokenizer, a in read
            ]
        fused, _ = fused_block(self.fuse, sources, self.maps, block, pairs)
        return _padded(fused, labelled)

    def nothing(self) -> dict[str, np.ndarray]:
        """The targets of one position that nothing is said of, as `row` gives them."""
        if self.fuse.objective == "alm":
            index = np.full((1, len(self.stores)), -1)
            empty = np.zeros(1, dtype=np.float32)
            return {"chunk_index": index, "chunk_logprobs": empty, "chunk_weights": np.zeros(1)}
        return {
            "target_ids": np.full((1, 1), -1),
            "target_probabilities": np.zeros((1, 1), dtype=np.float32),
            "target_weights": np.zeros(1),
        }


def won(rows: Sequence[str], stores: Sequence[str], corpus: str) -> dict[str, int]:
    """How many blocks each source predicts best, in bits per byte; a tie goes to the earlier.

    rows: names of the sources; stores, corpus: where they and the blocks lie. This is whom MinCE
    takes (FuseLLM 2401.10491, section 3.3), whatever the function in use.
    """
    opened, blocks = [open_store(store) for store in stores], read_blocks(Path(corpus))
    best = [
        int(bits_per_byte([store.read(number, block) for store in opened], block).argmin())
        for number, block in enumerate(blocks)
    ]
    return dict(zip(rows, np.bincount(best, minlength=len(opened)).tolist(), strict=True))


def _padded(fused: Aligned, labelled: np.ndarray) -> dict[str, np.ndarray]:
    """Sparse rows as (T, K) arrays, and each covered position's share of the block's loss."""
    rows = fused.probabilities
    counts = np.diff(rows.indptr)
    width = max(1, int(counts.max(initial=1)))
    slot = np.arange(rows.nnz) - np.repeat(rows.indptr[:-1], counts)
    at = np.repeat(np.arange(len(counts)), counts)
    ids = np.full((len(counts), width), -1, dtype=np.int64)
    probabilities = np.zeros((len(counts), width), dtype=np.float32)
    ids[at, slot] = rows.indices
    probabilities[at, slot] = rows.data
    covered = fused.covered & labelled
    return {
        "target_ids": ids,
        "target_probabilities": probabilities,
        "target_weights": covered / max(1, covered.sum()),
    }


def _chunked(
    fuse: Fuse, sources: Sequence[Distribution], block: Sequence[Piece], labelled: np.ndarray
) -> dict[str, np.ndarray]:
    """All sources' chunks; min_ce gives the best source's all the weight, avg_ce shares it out."""
    bits = bits_per_byte(sources, block)
    if fuse.function == "avg_ce":
        shares = softmax(-bits / float(fuse.parameters.get("temperature", 1.0)))
    else:
        shares = (np.arange(len(bits)) == bits.argmin()).astype(np.float64)
    found = [chunks(source, block) for source in sources]
    before = np.cumsum([0, *(len(logprobs) for _, logprobs in found)])
    index = [np.where(i >= 0, i + n, -1) for (i, _), n in zip(found, before[:-1], strict=True)]
    weights = [np.full(len(c), w / max(1, len(c))) for w, (_, c) in zip(shares, found, strict=True)]
    return {
        "chunk_index": np.where(labelled[:, None], np.stack(index, axis=1), -1),
        "chunk_logprobs": np.concatenate([c for _, c in found]).astype(np.float32),
        "chunk_weights": np.concatenate(weights),
    }
