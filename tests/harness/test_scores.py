"""What is known about an item beside its score: ties as the metric sees them, missing answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.api.registry import get_aggregation

from harness.evaluate import Item, _stock_suite
from harness.scores import _scores, _tied, _unextracted
from harness.scoring import Instance


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


def translation(aggregation: str, value: Any) -> Any:
    """A task of lm-eval's that calls its metric bleu."""
    return SimpleNamespace(
        config=SimpleNamespace(unsafe_code=False, num_fewshot=0, metadata=None),
        OUTPUT_TYPE="generate_until",
        higher_is_better=lambda: {"bleu": True},
        aggregation=lambda: {"bleu": get_aggregation(aggregation)},
        process_results=lambda doc, answers: {"bleu": value},
    )


@pytest.mark.parametrize(
    ("aggregation", "value", "metric", "rule"),
    [
        ("bleu", ("a b c d", "a b c d"), "bleu", "apart"),
        ("mean", 0.25, "mean_bleu", "macro"),
        ("nanmean", 0.25, "mean_bleu", "macro"),
    ],
)
def test_only_bleu_over_a_corpus_is_a_metric_of_a_corpus(
    aggregation: str, value: Any, metric: str, rule: str
) -> None:
    tasks = {"one": translation(aggregation, value), "two": translation(aggregation, value)}
    suite = _stock_suite("lm_eval:both", tasks)
    assert ({task.metric for task in suite.tasks}, suite.rule) == ({metric}, rule)
    loaded: Any = SimpleNamespace(tasks=tasks, suite=suite)
    request = Instance("generate_until", {}, ("say it", {}), 0)
    request.filtered_resps = {"none": "a b c d"}
    record = {"cluster": "0", "finish_reason": ["stop"], "output_type": "generate_until"}
    item = Item("one", 0, {}, [request])
    (row,) = _scores(loaded, item, record | {"text_tokens": 0}, None)
    assert row["metric"] == metric
    assert row["value"] == pytest.approx(1.0 if metric == "bleu" else 0.25)  # exp of a sum of logs
    assert (row["counts"] is None) == (metric == "mean_bleu")
