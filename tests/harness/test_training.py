"""A training as a stage of building: how far it is, and where it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.build import build
from harness.plan import plan
from harness.recipe import parse

TEXT = """
sources: {a: {path: "tiny:llama"}}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 640}
variants: {clm: {train: {init: a, batch_blocks: 2}}}
evaluate: {suites: [tiny_text]}
reference: a
machine: {device: cpu, checkpoint_every: 2}
"""


def test_a_training_tells_its_steps_and_when_it_goes_on_those_that_are_left(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = plan(parse(TEXT, "r"), home)
    seen: list[tuple[str, int, int]] = []

    @contextmanager
    def bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
        def progress(done: int) -> None:
            seen.append((label, total, done))
            if len(seen) == 3:
                raise KeyboardInterrupt

        yield progress

    monkeypatch.setattr("harness.training.bar", bar)
    with pytest.raises(KeyboardInterrupt):
        build(planned, ["clm"])
    assert seen == [("clm · steps", 5, done) for done in (1, 2, 3)]
    assert not build(planned, ["clm"])
    assert seen[3:] == [("clm · steps", 3, done) for done in (1, 2, 3)]
    assert "clm: 2 of 5 steps trained before, going on" in capsys.readouterr().err
