"""What tests of training go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy import sparse

from tests.fusion.jobs import MACHINE, TRAIN, job


@pytest.fixture(scope="module")
def prepared(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job that fuses the tiny Gemma and the tiny Llama into the tiny Llama, 8 steps."""
    from fusion.corpus import pack, read_documents, write_blocks
    from fusion.distributions import capture
    from fusion.models import load_model, load_tokenizer
    from fusion.vocabulary import build
    from harness.tiny import make_corpus

    root = tmp_path_factory.mktemp("job")
    documents = read_documents(make_corpus(root))
    target = load_tokenizer(tiny["llama"])
    blocks = pack(documents, target, 64, 64 * 16, seed=1)
    write_blocks(root / "blocks.parquet", blocks)
    sources = []
    for name in ("llama", "gemma"):
        tokenizer = load_tokenizer(tiny[name])
        capture(load_model(tiny[name]), tokenizer, blocks, root / name, 8, {})
        sparse.save_npz(root / f"{name}.npz", build(tokenizer, target))
        source = {"store": str(root / name), "map": str(root / f"{name}.npz")}
        sources.append(source | {"model": str(tiny[name]), "dtype": "float32"})
    fuse = {"sources": ["llama", "gemma"], "function": "avg_ce", "clm_weight": 0.5, "top_k": 8}
    return {
        "init": str(tiny["llama"]),
        "corpus": str(root / "blocks.parquet"),
        "train": TRAIN,
        "fuse": fuse,
        "sources": sources,
        "packing": "documents",
        "seed": 5,
        "machine": MACHINE,
    }


@pytest.fixture(scope="module")
def unbroken(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fusion.training import train

    out = tmp_path_factory.mktemp("unbroken") / "fused"
    train(job(prepared, out))
    return out
