"""What tests of machines with an object store between them start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
