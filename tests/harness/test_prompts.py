"""What rows were asked, as the report shows it, and which part of it is the question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.evaluate import load
from harness.prompts import asked, prompts, question
from harness.recipe import parse
from harness.store import write_json


def items(suite: str, tmp_path: Path) -> tuple[Any, list[Any]]:
    loaded = load(suite, tmp_path, None, 1)
    return loaded, loaded.items


def test_choices_stand_numbered_below_the_prompt(tmp_path: Path) -> None:
    loaded, found = items("tiny_choice", tmp_path)
    item = found[0]
    lines = asked(item).splitlines()
    choices = [str(request.args[1]) for request in item.requests]
    assert lines[-len(choices) :] == [f"[{i}]{text}" for i, text in enumerate(choices)]
    assert asked(item).startswith(item.prompt)
    assert all(c in question(item, loaded.tasks[item.task]) for c in choices)


def test_a_text_that_is_read_is_its_own_question(tmp_path: Path) -> None:
    loaded, found = items("tiny_text", tmp_path)
    assert asked(found[0]) == found[0].prompt
    assert question(found[0], loaded.tasks[found[0].task]) == found[0].prompt


def test_shots_are_no_part_of_the_question(tmp_path: Path) -> None:
    loaded, found = items("tiny_generate", tmp_path)
    item = found[0]
    own = question(item, loaded.tasks[item.task])
    assert own in asked(item)
    assert len(own) <= len(asked(item))


@pytest.fixture
def planned(home: Path) -> Any:
    from harness.plan import plan

    wanted = "{sources: {a: {path: 'tiny:llama'}}, evaluate: {suites: [tiny_choice]}, reference: a}"
    return plan(parse(wanted, "small"), home)


def finished(planned: Any, protocol: str) -> Any:
    (step,) = planned.evaluations("a")
    step.folder.mkdir(parents=True)
    write_json(step.folder / "manifest.json", {"kind": "evaluation", "protocol": protocol})
    return step


def test_prompts_are_kept_once_for_a_protocol(planned: Any) -> None:
    from harness.measuring import Measuring

    (step,) = planned.evaluations("a")
    protocol = Measuring(planned).suite(step).protocol
    assert prompts(planned, [step]) == {}  # nothing is measured
    step = finished(planned, protocol)
    (path,) = prompts(planned, [step]).values()
    frame = pd.read_parquet(path)
    assert list(frame) == ["task", "doc_id", "prompt", "question"]
    assert len(frame) == 12
    before = path.stat().st_mtime_ns
    assert prompts(planned, [step]) == {protocol: path}
    assert path.stat().st_mtime_ns == before


def test_prompts_of_another_protocol_are_not_made_up(
    planned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prompts(planned, [finished(planned, "0123456789ab")]) == {}
    assert "another protocol" in capsys.readouterr().err
