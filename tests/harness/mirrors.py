"""Folders of a mirror and of the store behind it, for tests to fill and to compare."""

from __future__ import annotations

from pathlib import Path

from harness import objects
from harness.store import write_json


def files(folder: Path) -> dict[str, bytes]:
    """Files by path, without work in progress and what a machine keeps for itself."""
    found = [p for p in folder.rglob("*") if p.is_file()]
    names = {str(p.relative_to(folder)): p for p in found}
    return {n: p.read_bytes() for n, p in names.items() if not objects.hidden(n)}


def made(folder: Path) -> Path:
    """A folder in which something was made, not finished yet."""
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "one.bin").write_bytes(b"one" * 1000)
    write_json(folder / "index.json", {"one": 3000})
    return folder
