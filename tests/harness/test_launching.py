"""Processes that train: what ends them."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from fusion.errors import RunError
from harness import launching


def test_the_last_step_of_a_log_is_read_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "training.csv"
    assert launching.last_step(log) == 0
    log.write_text("step,tokens,loss\n")
    assert launching.last_step(log) == 0
    log.write_text("step,tokens,loss\n1,20,3.0\n2,40,2.9\n")
    assert launching.last_step(log) == 2


def test_a_training_ends_when_it_is_no_longer_this_command_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "BEAT", 0.1)
    asked: list[float] = []

    def own() -> None:
        asked.append(time.monotonic())
        if len(asked) == 3:
            raise RunError("it is another's")

    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (tmp_path / "log").open("w") as out, pytest.raises(RunError, match="another's"):
        launching._run(command, out, {}, own)
    assert len(asked) == 3
    assert time.monotonic() - asked[-1] < 30, "it was ended"


def test_a_process_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as out:
        assert launching._run([sys.executable, "-c", "exit(3)"], out, {}, lambda: None) == 3
