"""Laws of whole merges, for every method: not a byte depends on threads, shards or order."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fusion import checkpoints, streaming
from fusion.checkpoints import merge
from fusion.errors import RunError
from fusion.merging import COLLECTED, MERGE_METHODS, needs_base, parameters

OPTIONS = {"density": 0.4, "select_topk": 0.3}  # so that something is trimmed and drawn
ORDERED = {"slerp"}  # t belongs to the second model, so the order of the two is part of the method

# Those that take statistics of their models are held in test_statistics.py.
WITHOUT = [method for method in MERGE_METHODS if method not in COLLECTED]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m0, m1, m2 in one file each, and the same as c0, c1, c2 in many.

    Changes are on a grid, so that magnitudes tie as those of bfloat16 checkpoints do.
    """
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    model = LlamaForCausalLM(config)
    zero = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for number in range(3):
        for name, parameter in model.named_parameters():
            steps = torch.randint(-4, 5, parameter.shape) if number else torch.zeros(())
            parameter.data = zero[name] + steps / 128
        model.save_pretrained(root / f"m{number}")
        model.save_pretrained(root / f"c{number}", max_shard_size="10KB")
    return root


def merged(
    root: Path, out: Path, kind: str, method: str, options: dict[str, Any], backwards: bool = False
) -> dict[str, bytes]:
    base, *inputs = [root / f"{kind}{number}" for number in range(3)]
    merge(inputs[:: -1 if backwards else 1], base if needs_base(method) else None, out, method,
          options)  # fmt: skip
    return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".safetensors", ".json")}


@pytest.mark.parametrize("method", WITHOUT)
def test_threads_shards_and_order_do_not_change_a_byte(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(streaming, "PIECE", 300)
    options = {key: value for key, value in OPTIONS.items() if key in parameters(method)}
    before = torch.get_num_threads()
    found = []
    try:
        for threads, kind in ((1, "m"), (4, "c")):
            torch.set_num_threads(threads)
            backwards = kind == "c" and method not in ORDERED
            found.append(merged(models, tmp_path / kind, kind, method, options, backwards))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    zero = load_file(models / "m0" / "model.safetensors")
    out = load_file(tmp_path / "m" / "model.safetensors")
    assert any(not tensor.equal(zero[name]) for name, tensor in out.items())


@pytest.mark.parametrize("method", [m for m in MERGE_METHODS if needs_base(m)])
def test_folders_equal_to_the_base_merge_to_the_base(
    models: Path, tmp_path: Path, method: str
) -> None:
    zero = models / "m0"
    merge([zero, zero], zero, tmp_path / "out", method, {})
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(zero / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, atol=0, rtol=0)


@pytest.mark.parametrize("method", WITHOUT)
def test_no_method_holds_more_than_pieces(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Whatever is read at once is a piece, or a sample, but for methods that need whole tensors."""
    if not streaming.by_rows(method, {}):
        pytest.skip(f"{method} needs whole tensors")
    monkeypatch.setattr(streaming, "PIECE", 300)
    read = checkpoints.Checkpoint.read
    most = [0]

    def watched(self: Any, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        out = read(self, name, start, stop)
        most[0] = max(most[0], out.numel())
        return out

    monkeypatch.setattr(checkpoints.Checkpoint, "read", watched)
    merged(models, tmp_path / "out", "m", method, {})
    assert 0 < most[0] <= 8 * 48  # eight rows of the widest matrix


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_what_stops_a_merge_midway_leaves_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Any
) -> None:
    written = [0]
    real = checkpoints._bytes

    def breaks(tensor: torch.Tensor) -> torch.Tensor:
        written[0] += 1
        if written[0] == 7:
            raise stop
        return real(tensor)

    monkeypatch.setattr(checkpoints, "_bytes", breaks)
    with pytest.raises(type(stop) if isinstance(stop, OSError) else stop):
        merged(models, tmp_path / "out", "m", "ties@paper", {})
    assert not list(tmp_path.iterdir())


def test_a_file_cut_short_is_found_before_anything_is_written(models: Path, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"m{number}").mkdir()
        for path in (models / f"m{number}").iterdir():
            (tmp_path / f"m{number}" / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "m1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RunError, match=r"m1/model\.safetensors: cannot be read"):
        merge([tmp_path / "m0", tmp_path / "m1"], None, tmp_path / "out", "linear", {})
    assert {p.name for p in tmp_path.iterdir()} == {"m0", "m1"}


def test_a_number_without_rows_merges_too(models: Path, tmp_path: Path) -> None:
    folders = []
    for number in range(2):
        folders.append(tmp_path / f"s{number}")
        folders[-1].mkdir()
        config = (models / "m0" / "config.json").read_text()
        (folders[-1] / "config.json").write_text(config)
        tensors = {"scale": torch.tensor(1.0 + number), "none": torch.zeros(0, 3)}
        save_file(tensors, folders[-1] / "model.safetensors")
    for method in WITHOUT:
        base = folders[0] if needs_base(method) else None
        merge(folders, base, tmp_path / "out", method, {})
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found["scale"].shape == ()
        assert found["none"].shape == (0, 3)
