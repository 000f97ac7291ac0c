"""Windows over whole texts: every byte once, enough context, the same text for every tokenizer.

Oracles: lm-eval's own rolling windows, and a plain double loop over tokens.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval import utils
from lm_eval.api.instance import Instance

from fusion.errors import RunError
from fusion.models import load_tokenizer
from fusion.tokens import tokenize
from harness.answering import measure
from harness.ensembles import EnsembleLM
from harness.evaluate import load
from harness.fallback import score_plainly
from harness.plan import plan
from harness.recipe import parse
from harness.rolling import Rolled, roll, sliding, windows
from harness.scoring import SharedPrefixLM
from harness.tiny import TEXT
from reports import parts
from reports.formats import comma_separated, markdown
from reports.records import Run, read_scores, token_perplexities
from reports.table import _cell, read

PREFIX = -7
BOOK = TEXT[0] + " Größe: 東京 😀. " + TEXT[31]
RULE = {"window": 64, "stride": 25}


@settings(max_examples=150)
@given(
    widths=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    stride=st.integers(1, 40),
    more=st.integers(0, 60),
    most=st.integers(1, 80),
)
def test_every_token_is_predicted_once_behind_enough_of_the_text(
    widths: list[int], stride: int, more: int, most: int
) -> None:
    ids, ends = list(range(len(widths))), np.cumsum(widths)
    begins = ends - np.array(widths)
    size = 2 * stride + more
    found = sliding(ids, ends, PREFIX, most, size, stride)
    assert [token for _, predicted in found for token in predicted] == ids
    for context, predicted in found:
        assert predicted
        assert len(context) + len(predicted) - 1 <= most, "the model reads all but the last token"
        # What is read is the text itself, without a gap, from somewhere up to what is predicted.
        first = predicted[0] - len(context)
        assert context == [PREFIX, *ids][first + 1 : predicted[0] + 1]
        for token in predicted:
            behind = int(begins[token] - begins[max(first, 0)])
            whole = first < 0
            cut = len(context) + (token - predicted[0]) > most // 2
            assert whole or cut or behind > size - stride - max(widths) - int(widths[token])


@given(st.integers(1, 40), st.integers(1, 50))
def test_a_window_that_holds_the_whole_text_is_the_plain_sum(count: int, most: int) -> None:
    ids = list(range(count))
    ends = np.arange(1, count + 1) * 3
    whole = sliding(ids, ends, PREFIX, count, 3 * count + 200, 100)
    assert whole == [([PREFIX], ids)]
    stock = utils.get_rolling_token_windows(ids, PREFIX, most, 1)
    disjoint = [utils.make_disjoint_window(window) for window in stock]
    assert windows(None, ids, "", PREFIX, most, None) == disjoint


@pytest.mark.parametrize(("window", "stride"), [(100, 51), (100, 0), (0, 0), (100, -1)])
def test_a_rule_that_leaves_too_little_context_is_refused(window: int, stride: int) -> None:
    with pytest.raises(ValueError, match=f"window {window}, stride {stride}"):
        sliding([1], np.array([1]), PREFIX, 8, window, stride)
    assert sliding([], np.array([], dtype=int), PREFIX, 8, 100, 50) == []


@pytest.mark.parametrize("name", ["llama", "gemma", "neox"])
def test_windows_of_a_real_tokenizer_are_scored_as_a_double_loop_does(
    tiny: dict[str, Path], name: str
) -> None:
    lm = SharedPrefixLM(str(tiny[name]), "float32", "cpu")
    ids = lm.tok_encode(BOOK, add_special_tokens=False)
    tokens = tokenize(load_tokenizer(str(tiny[name])), BOOK)
    assert ids == tokens.ids.tolist()
    request = Instance("loglikelihood_rolling", {}, (BOOK, RULE), 0)
    (found,) = lm.rolling([request])
    total = 0.0
    border = RULE["window"]
    stream = [lm.prefix_token_id, *ids]
    begins = [0, *tokens.ends[:-1].tolist()]
    for at in range(len(ids)):
        while tokens.ends[at] > border:
            border += RULE["stride"]
        first = 0
        if border > RULE["window"]:
            first = 1 + next(i for i, b in enumerate(begins) if b >= border - RULE["window"])
        context = stream[min(first, at) if first == 1 else first : at + 1]
        total += score_plainly(lm.model, context, [ids[at]]).total
    assert found.logprob == pytest.approx(total, abs=2e-3)
    assert found.tokens == len(ids)
    (plain,) = lm.rolling([Instance("loglikelihood_rolling", {}, (BOOK,), 0)])
    assert plain.tokens == found.tokens
    assert lm.loglikelihood_rolling([request]) == [found.logprob]


def test_copies_in_an_ensemble_say_what_one_says(tiny: dict[str, Path]) -> None:
    one, two = (SharedPrefixLM(str(tiny["llama"]), "float32", "cpu") for _ in range(2))
    from fusion.vocabulary import build

    copies = EnsembleLM([one, two], "mean_probability", {}, [build(two.tokenizer, one.tokenizer)])
    request = Instance("loglikelihood_rolling", {}, (BOOK, RULE), 0)
    (alone,) = one.rolling([request])
    (both,) = copies.rolling([request])
    assert both.logprob == pytest.approx(alone.logprob, abs=1e-6)
    assert both.tokens is None


class _Other:
    """A model of lm-eval's own kind, which cuts windows as it likes."""

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [-float(len(text)) for (text,) in (request.args for request in requests)]


def test_a_model_with_windows_of_its_own_reads_short_texts_only() -> None:
    short = Instance("loglikelihood_rolling", {}, ("a text", RULE), 0)
    assert roll(_Other(), [short]) == [Rolled(-6.0, None)]
    assert short.args == ("a text", RULE)
    long = Instance("loglikelihood_rolling", {}, (BOOK, RULE), 0, ("task", 0, 1))
    with pytest.raises(RunError, match=r"task: a text of \d+ bytes, longer than a window of 64"):
        roll(_Other(), [long])


@pytest.fixture
def measured(tiny: dict[str, Path], home: Path) -> Path:
    text = f"sources: {{model: {{path: {tiny['llama']}}}}}\nreference: model\n"
    made = plan(parse(f"{text}evaluate: {{suites: [tiny_text]}}", "r"), home)
    step = made.evaluations("model")[0]
    loaded = load("tiny_text", home, None, 17)
    measure(made, step, loaded, SharedPrefixLM(str(tiny["llama"]), "float32", "cpu"))
    return step.folder


def test_token_perplexity_stands_beside_bits_per_byte(measured: Path) -> None:
    run = Run.open(measured)
    frame = read_scores(run)
    assert set(frame.metric) == {"bits_per_byte", "nats_per_token"}
    wide = frame.pivot(index=["task", "doc_id"], columns="metric", values=["value", "weight"])
    nats = wide["value"]["nats_per_token"] * wide["weight"]["nats_per_token"]
    bits = wide["value"]["bits_per_byte"] * wide["weight"]["bits_per_byte"]
    assert nats.to_numpy() == pytest.approx(bits.to_numpy() * np.log(2))
    found = token_perplexities(run)
    primary = frame[frame.metric == "bits_per_byte"]
    cell = _cell("model", "tiny_text", run, primary, "")
    assert {t.task: t.token_perplexity for t in cell.tasks} == found
    some = frame[(frame.task == "kfuse_tiny_craft") & (frame.metric == "nats_per_token")]
    mean = (some.value * some.weight).sum() / some.weight.sum()
    assert found["kfuse_tiny_craft"] == pytest.approx(np.exp(mean))


def test_a_report_shows_it_by_row_and_task(measured: Path) -> None:
    home = measured.parent.parent
    run = Run.open(measured)
    listed = run.manifest["tasks"]
    suite = {"name": "tiny_text", "title": "Tiny text", "rule": "macro", "tasks": listed}
    row = {"name": "model", "kind": "source", "summary": "it", "cost": None, "captures": []}
    index = {"recipe": "r", "recipe_yaml": "", "reference": "model", "rows": [row], "facts": {}}
    index |= {"suites": [suite]}
    index |= {"cells": {"model": {"tiny_text": {"run": str(measured.relative_to(home))}}}}
    path = home / "reports" / "r-1" / "index.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(index))
    report = read(path)
    shown = token_perplexities(run)["kfuse_tiny_craft"]
    text = markdown(report)
    assert "not comparable across tokenizers" in text
    assert f"| model | tiny\\_text | craft | {shown:.2f} |" in text
    table = pd.read_csv(io.StringIO(comma_separated(report)))
    found = table.set_index("task").token_perplexity
    assert found["kfuse_tiny_craft"] == pytest.approx(shown)
    assert np.isnan(table[table.task.isna()].token_perplexity).all(), "a suite has none"


def test_a_text_without_a_score_counts_in_neither(measured: Path) -> None:
    frame = pd.read_parquet(measured / "scores.parquet")
    frame.loc[(frame.doc_id == 0) & (frame.task == "kfuse_tiny_craft"), "value"] = np.nan
    frame.to_parquet(measured / "scores.parquet")
    run = Run.open(measured)
    cell = _cell("m", "tiny_text", run, frame[frame.metric == "bits_per_byte"], "")
    assert [task.n for task in cell.tasks] == [3, 2]
    assert np.isfinite(token_perplexities(run)["kfuse_tiny_craft"])


def test_a_part_of_an_earlier_version_is_read_whole(tmp_path: Path) -> None:
    old = pa.schema([field for field in parts.SCHEMA if field.name not in parts.ADDED])
    record: dict[str, Any] = {name: None for name in old.names} | {"task": "t", "doc_id": 3}
    table = pa.Table.from_pylist([record], schema=old)
    path = tmp_path / "samples-00000.parquet"
    data = parts._encode(table, {"pack": 0, "writer": pa.__version__})
    path.write_bytes(data)
    label, found = parts.decode(path)
    assert label["pack"] == 0
    assert found == [record | {"text_tokens": None}]
    path.write_bytes(data.replace(b"task", b"tasl", 1))
    with pytest.raises(ValueError):
        parts.decode(path)
    lacking = table.drop_columns(["gold"])
    path.write_bytes(parts._encode(lacking, {"pack": 0, "writer": pa.__version__}))
    with pytest.raises(ValueError, match="no whole Parquet file of records"):
        parts.decode(path)
