"""The verdict commands: exit codes, files and messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.cli import main
from tests.reports.test_compare import RIGHT, evaluation


def kfuse(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command."""
    monkeypatch.setattr("sys.argv", ["kfuse", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_compare_prints_and_writes_the_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = evaluation(tmp_path, "base", {"a": RIGHT})
    other = evaluation(tmp_path, "candidate", {"a": np.ones(100)})
    table = tmp_path / "items.csv"
    assert kfuse(monkeypatch, "compare", one, other, "--csv", table) == 0
    assert "# candidate against base" in capsys.readouterr().out
    assert len(table.read_text().splitlines()) == 41


def test_what_cannot_be_compared_is_a_sentence_and_exit_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = evaluation(tmp_path, "base", {"a": RIGHT})
    other = evaluation(tmp_path, "candidate", {"a": RIGHT}, seed=5)
    assert kfuse(monkeypatch, "compare", one, other) == 1
    assert "seed is 5, in the reference 1" in capsys.readouterr().err
    assert kfuse(monkeypatch, "compare", one, "nothing") == 1
    assert "no run folder" in capsys.readouterr().err
