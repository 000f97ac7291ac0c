"""What a recipe's machine section comes to: a device that is there, processes, a file's path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fusion.errors import RunError
from harness import machine
from harness.plan import Plan, plan
from harness.recipe import load
from tests.harness.test_verdicts import kfuse


def planned(home: Path, *overrides: str) -> Plan:
    return plan(load("tiny", [f"machine.{text}" for text in overrides]).recipe, home)


@pytest.mark.parametrize("there", [True, False])
def test_a_device_is_what_is_there_or_was_asked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert machine.device(planned(home, "device=auto")) == ("cuda" if there else "cpu")
    assert machine.device(planned(home, "device=cpu")) == "cpu"
    asked = planned(home, "device=cuda:1")
    if there:
        assert machine.device(asked) == "cuda:1"
        return
    with pytest.raises(RunError, match=r"machine\.device: cuda:1 asked for, but no GPU is there"):
        machine.device(asked)


def test_training_holds_a_gpu_for_each_of_its_processes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = planned(home, "device=cuda", "processes=2", "hosts=2")
    held = {step.kind: machine.held_gpus(made, step) for step in made.builds()}
    assert held == {"fetch": 0, "pack": 0, "capture": 1, "map": 0, "train": 4, "merge": 0}


@pytest.mark.parametrize(
    ("said", "launches"),
    [("processes=1", False), ("processes=2", True), ("hosts=2", True), ("deepspeed=zero2", True)],
)
def test_what_takes_processes_of_its_own(home: Path, said: str, launches: bool) -> None:
    assert machine.launches(planned(home, said)) == launches


def test_a_file_of_deepspeed_goes_by_its_whole_path(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert machine.deepspeed(planned(home)) is None
    assert machine.deepspeed(planned(home, "deepspeed=zero3")) == "zero3"
    assert machine.deepspeed(planned(home, "deepspeed=own.json")) == str(tmp_path / "own.json")


@pytest.mark.parametrize(
    "command", [("run", "tiny"), ("report", "tiny"), ("status", "tiny"), ("plan", "tiny")]
)
def test_a_store_that_is_a_file_is_told_by_its_variable(
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("KFUSE_HOME", str(tmp_path / "file"))
    assert kfuse(monkeypatch, *command) == 1
    assert f"KFUSE_HOME: {tmp_path}/file is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("place", ["/proc/nope", "file/below"])
def test_a_store_that_cannot_be_made_is_told_before_any_work(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("KFUSE_HOME", str(tmp_path / place))
    for command in ("run", "report"):
        assert kfuse(monkeypatch, command, "tiny") == 1
        assert "KFUSE_HOME: nothing can be written into" in capsys.readouterr().err
