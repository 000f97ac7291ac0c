"""Packing the corpus and capturing distributions, on tiny real models."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion.corpus import pack, read_blocks, read_documents, read_piece, write_blocks
from fusion.distributions import capture, largest, open_store, predict
from fusion.errors import RunError
from fusion.models import load_model, load_tokenizer

TEXTS = [
    ("one", "The baker counts seven apples. " * 12),
    ("two", "A héron walks — 😀 — along. " * 12),
]


@pytest.fixture
def blocks(tiny: dict[str, Path]) -> list:
    return pack(TEXTS, load_tokenizer(tiny["llama"]), 64, 256, seed=3)


def test_blocks_are_full_and_their_tokens_are_their_text(
    tiny: dict[str, Path], blocks: list
) -> None:
    tokenizer = load_tokenizer(tiny["llama"])
    assert len(blocks) == 4
    for block in blocks:
        assert 64 - 16 < sum(len(piece.ids) for piece in block) <= 64
        for piece in block:
            eos = piece.ends_document
            ids = piece.ids[: len(piece.ids) - eos].tolist()
            assert tokenizer.decode(ids) == piece.text
            assert piece.ends[-1] == len(piece.text.encode())


def test_blocks_survive_the_disk_and_depend_on_the_seed(
    tiny: dict[str, Path], blocks: list, tmp_path: Path
) -> None:
    write_blocks(tmp_path / "b.parquet", blocks)
    again = read_blocks(tmp_path / "b.parquet")
    assert [[p.text for p in b] for b in again] == [[p.text for p in b] for b in blocks]
    assert all(
        (p.ids == q.ids).all()
        for b, c in zip(again, blocks, strict=True)
        for p, q in zip(b, c, strict=True)
    )


def test_a_corpus_that_is_too_small_says_so(tiny: dict[str, Path]) -> None:
    with pytest.raises(RunError, match="lower corpus.tokens"):
        pack(TEXTS, load_tokenizer(tiny["llama"]), 64, 10**6, seed=3)


def test_what_stands_behind_a_long_blank_is_not_lost(tiny: dict[str, Path]) -> None:
    text = "One begins here." + 2_000 * " " + 900 * "It goes on there. "
    blocks = pack([("a", text)], load_tokenizer(tiny["llama"]), 64, 2_560, seed=3)
    kept = "".join(piece.text for block in blocks for piece in block)
    assert "It goes on there." in kept
    assert text.startswith(kept)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
    with pytest.raises(RunError, match=r"c\.jsonl:2"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ('{"text": "cut', "not JSON"),
        (r'{"text": "half \ud83d"}', "ud83d is half a character"),
        (
            r'{"messages": [{"role": "assistant", "content": "\udc00"}]}',
            "udc00 is half a character",
        ),
    ],
)
def test_an_entry_that_is_no_text_is_named(tmp_path: Path, entry: str, expected: str) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n' + entry)
    with pytest.raises(RunError, match=rf"c\.jsonl:2: .*{expected}"):
        read_documents(tmp_path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "fine"}\n' * 99)
    (tmp_path / "c.jsonl.gz").write_bytes(whole[:12] + bytes(8) + whole[20:])
    with pytest.raises(RunError, match=r"c\.jsonl\.gz: not readable"):
        read_documents(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1 cut", bytes(range(256))])
def test_damaged_blocks_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "blocks.parquet").write_bytes(content)
    with pytest.raises(RunError, match=r"blocks\.parquet: missing or damaged; delete"):
        read_blocks(tmp_path / "blocks.parquet")


@pytest.mark.parametrize("name", ["llama", "gemma", "neox"])
def test_rows_are_those_of_the_plain_model(tiny: dict[str, Path], blocks: list, name: str) -> None:
    model, tokenizer = load_model(tiny[name]), load_tokenizer(tiny[name])
    for block in blocks:
        found = predict(model, tokenizer, block, 4)
        for index, piece in enumerate(block):
            ids, ends = read_piece(tokenizer, piece)
            rows = found.pieces == index
            assert found.ends[rows].tolist() == ends.tolist()
            # The piece alone, through the model's own forward: no packing, no drawn attention.
            with torch.no_grad():
                expected = model(torch.from_numpy(ids)[None]).logits[0].double().log_softmax(-1)
            got = np.take_along_axis(expected.numpy(), found.ids[rows], axis=1)
            np.testing.assert_allclose(found.logprobs[rows], got, atol=1e-5)
            best = expected.topk(4).values.numpy()
            np.testing.assert_allclose(found.logprobs[rows], best, atol=1e-5)
            tail = np.log(1 - np.exp(best).sum(1))
            np.testing.assert_allclose(found.log_tail[rows], tail, atol=1e-4)
            gold = expected[:-1].gather(1, torch.from_numpy(ids[1:, None]))[:, 0].numpy()
            np.testing.assert_allclose(found.gold_logprob[rows][:-1], gold, atol=1e-5)
            assert np.isnan(found.gold_logprob[rows][-1])


def test_a_store_says_what_it_is_and_keeps_within_its_error(
    tiny: dict[str, Path], blocks: list, tmp_path: Path
) -> None:
    model, tokenizer = load_model(tiny["gemma"]), load_tokenizer(tiny["gemma"])
    capture(model, tokenizer, blocks, tmp_path / "s", 4, {"model": "gemma"})
    store = open_store(tmp_path / "s")
    assert store.header["model"] == "gemma"
    assert {"k", "codec", "step", "vocabulary"} < set(store.header)
    for number, block in enumerate(blocks):
        exact, found = predict(model, tokenizer, block, 4), store.read(number)
        for name in ("pieces", "ends", "ids"):
            assert (getattr(found, name) == getattr(exact, name)).all()
        for name in ("logprobs", "log_tail", "gold_logprob"):
            np.testing.assert_allclose(getattr(found, name), getattr(exact, name), atol=0.02)
    header = tmp_path / "s" / "header.json"
    header.write_text(header.read_text().replace("planes", "plains"))
    with pytest.raises(RunError, match="plains-zstd-1, not planes-zstd-1"):
        open_store(tmp_path / "s")


def test_an_interrupted_capture_goes_on_and_ends_the_same(
    tiny: dict[str, Path], blocks: list, tmp_path: Path
) -> None:
    model, tokenizer = load_model(tiny["gemma"]), load_tokenizer(tiny["gemma"])
    whole = capture(model, tokenizer, blocks, tmp_path / "whole", 4, {})

    def interrupt(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(model, tokenizer, blocks, tmp_path / "cut", 4, {}, interrupt)
    # What a kill in the middle of a line leaves:
    with (tmp_path / "cut" / "index.jsonl").open("a") as index:
        index.write('{"shard": "sha')
    seen: list[int] = []
    capture(model, tokenizer, blocks, tmp_path / "cut", 4, {}, seen.append)
    assert seen[0] == 2
    for shard in sorted((tmp_path / "whole").glob("*.bin")):
        assert shard.read_bytes() == (tmp_path / "cut" / shard.name).read_bytes()
    assert len(open_store(tmp_path / "cut")) == len(whole)


def test_a_flipped_byte_names_its_shard(
    tiny: dict[str, Path], blocks: list, tmp_path: Path
) -> None:
    model, tokenizer = load_model(tiny["llama"]), load_tokenizer(tiny["llama"])
    store = capture(model, tokenizer, blocks, tmp_path / "s", 4, {})
    shard = tmp_path / "s" / "shard-00001.bin"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunError, match="shard-00001.bin: checksum"):
        store.read(1)
    shard.write_bytes(content[:-3])
    with pytest.raises(RunError, match="cut short"):
        store.read(1)
    assert len(store.read(0).ids)


def test_a_store_whose_index_or_header_is_cut_says_so(
    tiny: dict[str, Path], blocks: list, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    capture(load_model(tiny["llama"]), load_tokenizer(tiny["llama"]), blocks, path, 4, {})
    whole = (path / "index.jsonl").read_bytes()
    (path / "index.jsonl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"index\.jsonl: ends before block .*; delete"):
        open_store(path).read(len(blocks) - 1)
    (path / "index.jsonl").write_bytes(b"\xff\xfe" + whole)
    with pytest.raises(RunError, match="ends before block 0"):
        open_store(path).read(0)
    for content in (b'{"codec": "ki', b"\xff\xfe"):
        (path / "header.json").write_bytes(content)
        with pytest.raises(RunError, match=r"header\.json: damaged; delete"):
            open_store(path)


@given(st.integers(0, 10**6), st.integers(1, 20), st.sampled_from([300, 2560, 2600, 5000]))
def test_the_largest_are_those_of_topk(seed: int, k: int, width: int) -> None:
    scores = torch.rand(3, width, generator=torch.Generator().manual_seed(seed))
    values, ids = largest(scores, k)
    assert (values == scores.topk(k, -1).values).all()
    assert (scores.gather(1, ids) == values).all()
    assert all(len(set(row.tolist())) == k for row in ids)
