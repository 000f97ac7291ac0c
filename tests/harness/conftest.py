"""What tests of two machines, or of two models of one shape, start from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from harness import mirror


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder behind a store that is named by a URL."""
    monkeypatch.setenv("KFUSE_HOME", f"file://{tmp_path / 'store'}")
    return tmp_path / "store"


@pytest.fixture
def at(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Be on a machine, with a mirror of its own."""

    def go(name: str) -> Path:
        monkeypatch.setenv("KFUSE_MIRROR", str(tmp_path / name))
        monkeypatch.setattr(mirror, "_seen", set())
        return tmp_path / name

    return go


@pytest.fixture
def other(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A model folder like the tiny Llama's, all weights a hundredth larger."""
    folder = tmp_path / "other"
    shutil.copytree(tiny["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    larger = {name: 1.01 * weight for name, weight in weights.items()}
    save_file(larger, folder / "model.safetensors", {"a": "b"})
    return folder
