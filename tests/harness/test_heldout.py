"""Held-out text is reported by domain, whatever names the domains."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fusion.corpus import read_documents
from fusion.errors import RunError
from harness.evaluate import load
from harness.heldout import heldout_suite
from harness.measuring import load_suite_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text in files and folders, two of which would share a plain name."""
    root = tmp_path / "own"
    for place in ("sea tales/deep", "sea-tales", "law"):
        (root / place).mkdir(parents=True)
    (root / "sea tales/one.txt").write_text("one fish")
    (root / "sea tales/deep/two.txt.gz").write_bytes(gzip.compress(b"two fish"))
    (root / "sea-tales/one.txt").write_text("no fish")
    rows = [{"text": "plain law"}, {"text": "marked", "domain": "treaty"}]
    (root / "law/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "alone.txt").write_text("by itself")
    (root / "empty.txt").write_text(" \n")
    (root / "notes.md").write_text("no text of ours")
    return root


def test_a_domain_is_named_by_its_line_its_folder_or_its_file(folder: Path, tmp_path: Path) -> None:
    suite, data = heldout_suite(str(folder), tmp_path / "home")
    loaded = load("bits_per_byte", data, None, 0, suite)
    titles = {task.name: task.title for task in suite.tasks}
    found: dict[str, list[str]] = {}
    for item in loaded.items:
        found.setdefault(titles[item.task], []).append(item.prompt)
    assert found == {
        "alone": ["by itself"],
        "law": ["plain law"],
        "sea tales": ["two fish", "one fish"],
        "sea-tales": ["no fish"],
        "treaty": ["marked"],
    }
    assert len(titles) == 5, "two domains share a task's name"
    rules = {str(request.args[1]) for item in loaded.items for request in item.requests}
    assert rules == {"{'window': 4096, 'stride': 2048}"}


def test_a_training_corpus_keeps_its_domains(folder: Path) -> None:
    assert {domain for domain, _ in read_documents(folder)} == {
        "one", "two", "rows", "treaty", "alone", "empty",
    }  # fmt: skip


def test_a_folder_without_text_says_which_key_names_it(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    with pytest.raises(RunError, match=r"corpus.heldout: .*own holds no .jsonl, .json or .txt"):
        heldout_suite(str(tmp_path / "own"), tmp_path)
    (tmp_path / "own/bad.jsonl").write_text('{"texts": 1}')
    with pytest.raises(RunError, match=r"bad.jsonl:1: an entry must be an object with a 'text'"):
        load_suite_data("bits_per_byte", tmp_path, None, 0, str(tmp_path / "own"), None)
