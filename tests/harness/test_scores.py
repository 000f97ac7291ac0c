"""What is known about an item beside its score: ties as the metric sees them, missing answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from harness.scores import _tied, _unextracted


def tied(metric: str, choices: list[str], found: list[float]) -> bool:
    object_ = SimpleNamespace(OUTPUT_TYPE="multiple_choice", doc_to_choice=lambda doc: choices)
    task = SimpleNamespace(name="t", metric=metric)
    loaded: Any = SimpleNamespace(tasks={"t": object_}, suite=SimpleNamespace(tasks=(task,)))
    item: Any = SimpleNamespace(task="t", doc={})
    return _tied(loaded, item, {"choice_ll": found})


@pytest.mark.parametrize(
    ("metric", "choices", "found", "expected"),
    [
        ("acc", ["a", "bb"], [-2.0, -2.0], True),
        ("acc_norm", ["a", "bb"], [-2.0, -2.0], False),
        ("acc_norm", ["a", "bb"], [-2.0, -4.0], True),
        ("acc", ["a", "bb"], [-2.0, -4.0], False),
        ("acc_bytes", ["é", "ab"], [-2.0, -2.0], True),
        ("acc_norm", ["é", "ab"], [-2.0, -2.0], False),
        ("acc_mutual_info", ["a", "b"], [-2.0, -3.0, -1.0, -2.0], True),
        ("acc", ["a", "b", "c"], [-1.0, -3.0, -3.0], False),
        ("acc", ["a"], [-1.0], False),
    ],
)
def test_a_tie_is_one_of_the_metric_that_counts(
    metric: str, choices: list[str], found: list[float], expected: bool
) -> None:
    assert tied(metric, choices, found) is expected


def test_an_answer_is_missing_if_no_text_holds_one() -> None:
    record = {"output_type": "generate_until"}
    assert _unextracted(record, ["[invalid]"])
    assert _unextracted(record, [["[invalid]", " "]])
    assert not _unextracted(record, [["[invalid]", "4"]])
    assert not _unextracted({"output_type": "multiple_choice"}, [(-1.0, False)])
