"""Models kept as differences: what comes back, how near it is, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion import deltas
from fusion.checkpoints import identity
from fusion.deltas import FACTS, FILE, compress, restore, room
from fusion.errors import RunError
from fusion.models import load_model


def moved(folder: Path, to: Path, rank: int | None = None, dtype: str = "float32") -> Path:
    """A copy of a model whose matrices have changed, by a change of that rank if it is given."""
    shutil.copytree(folder, to)
    g = torch.Generator().manual_seed(7)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        change = torch.randn(tensor.shape, generator=g)
        if rank and tensor.dim() == 2:
            left = torch.randn(tensor.shape[0], rank, generator=g)
            change = left @ torch.randn(rank, tensor.shape[1], generator=g)
        weights[name] = (tensor + 1e-3 * change).to(getattr(torch, dtype))
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def difference(one: Path, two: Path) -> dict[str, Tensor]:
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert a.keys() == b.keys()
    return {name: (a[name].float() - b[name].float()).norm() for name in a}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_comes_back_byte_for_byte(dtype: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    model = moved(tiny["llama"], tmp_path / "model", dtype=dtype)
    facts = compress(model, tiny["llama"], tmp_path / "delta", "exact")
    assert facts["bytes"] < facts["bytes_before"]
    found = restore(tmp_path / "delta", tiny["llama"], tmp_path / "out")
    assert found["restored"] == facts["model"] == identity(model) == identity(tmp_path / "out")
    assert load_model(tmp_path / "out")(torch.tensor([[5, 6]])).logits.isfinite().all()
    # A copy costs next to nothing, and is itself again.
    facts = compress(tiny["llama"], tiny["llama"], tmp_path / "none", "exact")
    assert facts["bytes"] < facts["bytes_before"] / 20
    assert restore(tmp_path / "none", tiny["llama"], tmp_path / "same")["restored"] == facts["base"]
    # Shards are the caller's business.
    restore(tmp_path / "delta", tiny["llama"], tmp_path / "cut", shard_bytes=30_000)
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 1
    assert identity(tmp_path / "cut") == identity(model)


def test_more_bits_are_nearer_and_larger(tiny: dict[str, Path], tmp_path: Path) -> None:
    model = moved(tiny["llama"], tmp_path / "model")
    before = difference(model, tiny["llama"])
    left, sizes = [], []
    for bits in (0.5, 1.0, 2.0, 4.0):
        facts = compress(model, tiny["llama"], tmp_path / f"d{bits}", bits)
        found = restore(tmp_path / f"d{bits}", tiny["llama"], tmp_path / f"r{bits}")
        assert found["restored"] != facts["model"]
        after = difference(model, tmp_path / f"r{bits}")
        left.append(sum(float(v**2) for v in after.values()))
        sizes.append(facts["bytes"])
        # What is no matrix is kept as it is.
        assert all(after[n] == 0 for n in after if "norm" in n)
        assert all(after[n] < before[n] for n in after if "norm" not in n)
    assert left == sorted(left, reverse=True)
    assert sizes == sorted(sizes)


def test_a_change_of_low_rank_nearly_comes_back(tiny: dict[str, Path], tmp_path: Path) -> None:
    model = moved(tiny["llama"], tmp_path / "model", rank=2)
    compress(model, tiny["llama"], tmp_path / "delta", 2.0)
    restore(tmp_path / "delta", tiny["llama"], tmp_path / "out")
    before, after = difference(model, tiny["llama"]), difference(model, tmp_path / "out")
    for name in after:
        assert after[name] < 0.02 * before[name] + 1e-9, name  # the first two are at eight bits


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 40),
    columns=st.integers(2, 40),
    width=st.sampled_from([2, 3, 8]),
    seed=st.integers(0, 10**6),
)
def test_codes_come_back_and_are_the_nearest(
    rows: int, columns: int, width: int, seed: int
) -> None:
    vectors = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, steps = deltas._rounded(vectors, width)
    packed = deltas._bits(codes, width)
    assert len(packed) == -(-rows * columns * width // 8)
    assert torch.equal(deltas._unbits(packed, width, rows, columns), codes)
    for column in range(columns):
        step = float(steps[column])
        levels = [(code - (2**width - 1) / 2) * step for code in range(2**width)]
        for row in range(rows):
            value = float(vectors[row, column])
            found = levels[int(codes[row, column])]
            assert abs(found - value) <= min(abs(one - value) for one in levels) + 1e-6


@given(rows=st.integers(2, 3000), columns=st.integers(2, 3000), bits=st.floats(0.01, 16))
def test_there_is_no_more_than_there_is_room_for(rows: int, columns: int, bits: float) -> None:
    groups = room(rows, columns, bits)
    cost = sum(count * (width * (rows + columns) + 64) for count, width in groups)
    assert cost <= bits * rows * columns or groups == [(1, 2)]
    assert sum(count for count, _ in groups) <= min(rows, columns)
    # 1/16 of bfloat16, as the paper has it.
    assert room(4096, 4096, 1.0)[:2] == [(2, 8), (32, 3)]


def test_wrong_bases_and_damaged_deltas_are_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    model = moved(tiny["llama"], tmp_path / "model")
    delta, out = tmp_path / "delta", tmp_path / "out"
    compress(model, tiny["llama"], delta, 1.0)

    def refused(base: Path = tiny["llama"]) -> str:
        with pytest.raises(RunError) as error:
            restore(delta, base, out)
        assert not out.exists()
        return str(error.value)

    assert "is not the base" in refused(model)
    content = (delta / FILE).read_bytes()
    for wrong in (content[:-5], content[:-1] + b"x", b""):
        (delta / FILE).write_bytes(wrong)
        assert "missing, cut short or changed" in refused()
    (delta / FILE).unlink()
    assert "missing, cut short or changed" in refused()
    (delta / FACTS).write_text("{")
    assert "keeps no delta" in refused()
    with pytest.raises(RunError, match="keeps no delta"):
        restore(tiny["gemma"], tiny["llama"], out)
    for bits in (0, 17, "exakt"):
        with pytest.raises(ValueError, match="bits is"):
            compress(model, tiny["llama"], delta, bits)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][3, 4] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="not finite"):
        compress(model, tiny["llama"], delta, 1.0)


def test_tensors_that_the_base_lacks_are_kept_whole(tiny: dict[str, Path], tmp_path: Path) -> None:
    model = moved(tiny["llama"], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embedding, embedding[:3]])
    weights["more"] = torch.arange(5)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "chat_template.jinja").write_text("{{ messages }}")
    facts = compress(model, tiny["llama"], tmp_path / "delta", 2.0)
    assert facts["own"] == ["chat_template.jinja"]
    restore(tmp_path / "delta", tiny["llama"], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["more"], weights["more"])
    assert torch.equal(found["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("bits", ["exact", 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool"])
def test_tensors_of_one_element_or_none_come_back(
    bits: float | str, dtype: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    odd = {
        "scalar": (),
        "one": (1,),
        "square": (1, 1),
        "none": (0,),
        "empty": (0, 3),
        "row": (1, 3),
    }
    folders = [shutil.copytree(tiny["llama"], tmp_path / name) for name in ("base", "model")]
    for value, folder in enumerate(folders):
        held = load_file(folder / "model.safetensors")
        held |= {
            name: torch.full(shape, value).to(getattr(torch, dtype)) for name, shape in odd.items()
        }
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    compress(folders[1], folders[0], tmp_path / "delta", bits)
    restore(tmp_path / "delta", folders[0], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(folders[1] / "model.safetensors").items():
        if name in odd or bits == "exact":
            assert torch.equal(found[name], tensor), name
