"""Two rows item by item, and everything that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reports.compare import Comparison, NotComparable, compare, compare_all
from reports.compare_formats import comma_separated, markdown
from reports.pairs import open_pairs
from reports.records import Run

HOSTILE = "<script>|x`\x1b[31m\nnew"


def evaluation(home: Path, row: str, tasks: dict[str, Any], **changes: Any) -> Path:
    """An evaluation folder with scores and samples; `tasks` gives the values of each task."""
    metric = changes.pop("metric", "acc")
    prompt = changes.pop("prompt", "p")
    folder = home / "evaluations" / f"{row.encode().hex()[:24]}-{changes.get('suite', 'suite')}"
    folder.mkdir(parents=True)
    scores, samples, listed = [], [], []
    for task, values in tasks.items():
        for i, value in enumerate(values):
            scores.append([task, i, str(i), metric, float(value), 1.0, "ok", None])
            likely = [-1.0, -2.0] if value else [-2.0, -1.0]
            samples.append([task, i, f"{prompt}{i}", f"d{i}", "0", "multiple_choice", likely])
        better = {"metric": metric, "higher_is_better": metric != "bits_per_byte"}
        listed.append(
            {"task": task, "n_total": len(values), "shots": 0, "protocol": "t", "chance": 0.25}
            | better
        )
    columns = ["task", "doc_id", "cluster", "metric", "value", "weight", "outcome", "extracted"]
    pd.DataFrame(scores, columns=columns).to_parquet(folder / "scores.parquet")
    columns = ["task", "doc_id", "prompt_hash", "doc_hash", "gold", "output_type", "choice_ll"]
    frame = pd.DataFrame(samples, columns=columns)
    frame["generation"], frame["finish_reason"] = [[] for _ in samples], [[] for _ in samples]
    frame["choice_chars"] = [[1, 1] for _ in samples]
    frame.to_parquet(folder / "samples-00000.parquet")
    manifest: dict[str, Any] = {
        "kind": "evaluation", "row": row, "suite": "suite", "rule": "macro", "protocol": "p1",
        "model_identity": row, "seed": 1, "limit": None, "partial": False, "dtype": "float32",
        "lm_eval": "0.4.13", "tasks": listed,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def index(home: Path, cells: dict[str, Any], name: str = "demo-1") -> Path:
    path = home / "reports" / name / "index.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows": [{"name": row} for row in cells], "cells": cells}))
    return path


RIGHT = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 1] * 10)


def two(home: Path, base: dict[str, Any], candidate: dict[str, Any], **changes: Any) -> Comparison:
    one = evaluation(home, "base", base)
    other = evaluation(home, "candidate", candidate, **changes)
    return compare_all(open_pairs(str(one), str(other), home)[0])[0]


def test_one_task_is_mcnemar_with_tangos_interval(tmp_path: Path) -> None:
    better = RIGHT.copy()
    better[np.flatnonzero(RIGHT == 0)[:9]] = 1
    better[0] = 0
    found = two(tmp_path, {"a": RIGHT}, {"a": better})
    total = found.total
    assert (total.base, total.candidate) == pytest.approx((0.6, 0.68))
    assert (total.better, total.worse, total.n) == (9, 1, 100)
    assert total.gain == pytest.approx(0.08)
    assert (total.interval, total.test) == ("tango", "mcnemar")
    assert total.p_value == pytest.approx(2 * 11 / 2**10 - 10 / 2**10)  # mid-p of 1 of 10
    assert total.detectable == pytest.approx(2.8016 * np.sqrt(0.1 / 100), rel=1e-3)
    assert total.verdict == "better"
    assert found.items is not None
    assert len(found.items) == 10
    first = found.items.iloc[0]
    assert (first.prompt_hash, first.value_base, first.value_candidate) == ("p0", 1.0, 0.0)
    assert first.answer_base.startswith("choice 0")
    assert first.answer_candidate.startswith("choice 1")


def test_a_suite_is_the_macro_mean_of_its_tasks(tmp_path: Path) -> None:
    found = two(tmp_path, {"a": RIGHT, "b": RIGHT[:10]}, {"a": RIGHT, "b": 1 - RIGHT[:10]})
    assert found.total.gain == pytest.approx((0 + (0.4 - 0.6)) / 2)
    assert [t.gain for t in found.tasks] == pytest.approx([0, -0.2])
    assert found.total.interval == "mover"  # ten discordant items are few
    assert found.total.p_value > 0.3
    text = markdown([found], items=2)
    assert "10 of 110 items differ. The first 2:" in text
    assert comma_separated([found]).count("\n") == 11


def test_a_task_that_was_asked_but_not_scored_leaves_no_gain_of_a_sample(tmp_path: Path) -> None:
    sampled = {"partial": True, "limit": 100}
    base = evaluation(tmp_path, "b", {"x": RIGHT, "y": RIGHT}, **sampled)
    unscored = {"x": RIGHT, "y": np.full(100, np.nan)}
    other = evaluation(tmp_path, "c", unscored, **sampled)
    with pytest.raises(NotComparable, match="no item of y was scored on both sides"):
        compare(Run.open(base), Run.open(other))
    for folder in (base, other):  # without any record of it, the sample did not draw it
        frame = pd.read_parquet(folder / "scores.parquet")
        frame[frame.task == "x"].to_parquet(folder / "scores.parquet")
    found = compare(Run.open(base), Run.open(other), items=False)
    assert [task.name for task in found.tasks] == ["x"]


def test_lower_bits_are_a_gain(tmp_path: Path) -> None:
    bits = np.linspace(0.9, 1.1, 50)
    base = evaluation(tmp_path, "base", {"a": bits}, metric="bits_per_byte")
    other = evaluation(
        tmp_path, "c", {"a": bits - np.linspace(0.01, 0.05, 50)}, metric="bits_per_byte"
    )
    found = compare(Run.open(base), Run.open(other), items=False)
    assert found.total.gain == pytest.approx(0.03)
    assert (found.total.interval, found.total.test) == ("bootstrap", "permutation")
    assert "+0.0300" in markdown([found])


def test_all_items_tied_gives_an_interval_around_zero_and_no_verdict(tmp_path: Path) -> None:
    found = two(tmp_path, {"a": RIGHT, "b": RIGHT}, {"a": RIGHT, "b": RIGHT})
    total = found.total
    assert (total.gain, total.p_value, total.detectable, total.verdict) == (
        0,
        1,
        None,
        "inconclusive",
    )
    assert total.interval == "mover"
    assert total.low is not None
    assert total.low < 0
    assert "The rows agree on every item." in markdown([found])
    assert "unknown" in markdown([found])


def test_one_discordant_item_decides_nothing(tmp_path: Path) -> None:
    once = RIGHT.copy()
    once[1] = 1
    total = two(tmp_path, {"a": RIGHT}, {"a": once}).total
    assert total.verdict == "inconclusive"
    assert total.p_value == pytest.approx(0.5)
    assert total.low is not None
    assert total.low < 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"protocol": "p2"}, "protocol is p2, in the reference p1"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"seed": 2}, "seed"),
        ({"suite": "other"}, "suite is other"),
        ({"metric": "acc_norm"}, "a.metric"),
        ({"prompt": "q"}, "not asked in the same words"),
    ],
)
def test_unlike_runs_are_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(NotComparable, match=named):
        two(tmp_path, {"a": RIGHT}, {"a": RIGHT}, **change)


def change_scores(folder: Path, change: Any) -> None:
    path = folder / "scores.parquet"
    change(pd.read_parquet(path)).to_parquet(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: f.iloc[1:], "1 items were measured on one side only"),
        (lambda f: f.iloc[:0], "100 items were measured on one side only"),
        (lambda f: pd.concat([f, f[:3]]), "3 duplicate records"),
        (lambda f: f.assign(value=np.nan), "no item was scored on both sides"),
        (lambda f: f.assign(value=np.inf), "finite or NaN"),
        (lambda f: f.assign(weight=2.0), "did not measure the same text"),
        (lambda f: f[["task"]], "no column doc_id"),
    ],
)
def test_wrong_records_are_refused(tmp_path: Path, change: Any, named: str) -> None:
    one = evaluation(tmp_path, "base", {"a": RIGHT})
    other = evaluation(tmp_path, "candidate", {"a": RIGHT})
    change_scores(other, change)
    with pytest.raises(NotComparable, match=named):
        compare_all(open_pairs(str(one), str(other), tmp_path)[0])


def test_a_flipped_byte_an_unfinished_run_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    one = evaluation(tmp_path, "base", {"a": RIGHT})
    other = evaluation(tmp_path, "candidate", {"a": RIGHT})
    whole = (other / "scores.parquet").read_bytes()
    (other / "scores.parquet").write_bytes(whole[:-5] + b"?" + whole[-4:])
    with pytest.raises(NotComparable, match=r"scores.parquet: not a readable Parquet"):
        compare_all(open_pairs(str(one), str(other), tmp_path)[0])
    (other / "scores.parquet").write_bytes(whole)
    pd.DataFrame({"x": [1]}).to_parquet(other / "samples-00001.parquet")
    with pytest.raises(NotComparable, match="no column task, doc_id"):
        compare_all(open_pairs(str(one), str(other), tmp_path)[0])
    (other / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="unfinished"):
        open_pairs(str(one), str(other), tmp_path)


def test_items_scored_on_one_side_only_are_said(tmp_path: Path) -> None:
    some = RIGHT.astype(float)
    some[:7] = np.nan
    found = two(tmp_path, {"a": RIGHT}, {"a": some})
    assert (found.total.n, found.unscored) == (93, 7)
    assert "7 items have no score" in markdown([found])


def test_rows_of_a_report_are_found_by_name(tmp_path: Path) -> None:
    folders = {row: evaluation(tmp_path, row, {"a": RIGHT}) for row in ("x", "y")}
    cells = {row: {"suite": {"run": str(f.relative_to(tmp_path))}} for row, f in folders.items()}
    cells["gap"] = {"suite": {"reason": "not built: no corpus"}}
    first = index(tmp_path, cells)
    assert len(open_pairs("x", "y", tmp_path)[0]) == 1
    with pytest.raises(NotComparable, match="not built: no corpus"):
        open_pairs("x", "gap", tmp_path)
    with pytest.raises(FileNotFoundError, match="rows of demo-1: x, y, gap"):
        open_pairs("x", "zz", tmp_path)
    index(tmp_path, cells, "other-2")
    with pytest.raises(FileNotFoundError, match="choose one with --report: demo-1, other-2"):
        open_pairs("x", "y", tmp_path)
    assert len(open_pairs("x", "y", tmp_path, "other")[0]) == 1
    assert len(open_pairs("x", "y", tmp_path, str(first))[0]) == 1


def test_hostile_texts_stay_in_their_cells(tmp_path: Path) -> None:
    one = evaluation(tmp_path, HOSTILE, {"a": RIGHT})
    other = evaluation(tmp_path, "c", {"a": 1 - RIGHT})
    path = other / "samples-00000.parquet"
    frame = pd.read_parquet(path)
    frame["generation"] = [[HOSTILE]] * len(frame)
    frame.to_parquet(path)
    text = markdown(compare_all(open_pairs(str(one), str(other), tmp_path)[0]))
    assert "<script" not in text
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("| a ")]
    assert rows
    assert {line.replace("\\|", "").count("|") for line in rows if "`" in line} == {6}
