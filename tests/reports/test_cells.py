"""What cells hold beside a score: second averages, programs, pass@k; costs without a score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reports.formats import comma_separated, markdown, score_text
from reports.html import panels
from reports.statistics import wilson
from reports.table import read
from tests.reports.test_report import RIGHT, TASK, run, store


def test_a_second_average_leaves_a_task_out_also_where_the_first_has_no_score(
    tmp_path: Path,
) -> None:
    tasks = [TASK | {"task": name, "title": name.title()} for name in ("go", "rust", "php")]
    path = store(tmp_path, {"base": {"acc": {"run": run(tmp_path, "base", RIGHT, tasks=tasks)}}})
    content = json.loads(path.read_text())
    suite = content["suites"][0] | {"tasks": tasks, "without": ["go"]}
    path.write_text(json.dumps(content | {"suites": [suite]}))
    (scores,) = tmp_path.glob("evaluations/*/scores.parquet")
    frame = pd.read_parquet(scores)
    values = {"go": 1.0, "rust": 0.25, "php": 0.5}
    frame = pd.concat([frame.assign(task=name, value=value) for name, value in values.items()])
    frame.to_parquet(scores)
    cell = read(path).cell("base", "acc")
    assert cell.score == pytest.approx(1.75 / 3)
    assert cell.without
    assert (cell.without.title, cell.without.n) == ("without Go", 80)
    assert cell.without.score == pytest.approx(0.375)
    assert "58.3" in markdown(read(path))
    assert "without Go 37.5" in markdown(read(path))
    assert "base,acc,without Go,,0.375" in comma_separated(read(path))
    frame.loc[frame.task == "go", ["value", "outcome"]] = [float("nan"), "infra"]
    frame.to_parquet(scores)
    report = read(path)
    assert report.cell("base", "acc").score is None
    assert score_text(report.cell("base", "acc"), report.columns[0]).startswith(
        "not measured; without Go 37.5"
    )
    (line,) = panels(report)["scores"].tables[0].rows
    assert line[1].text == score_text(report.cell("base", "acc"), report.columns[0])
    frame.loc[frame.task == "php", "value"] = float("nan")
    frame.to_parquet(scores)
    assert read(path).cell("base", "acc").without is None


def test_no_gain_is_of_the_tasks_that_are_left(tmp_path: Path) -> None:
    tasks = [TASK | {"task": name, "title": name.title(), "n_total": 20} for name in ("go", "rust")]
    how: dict[str, Any] = {"tasks": tasks, "partial": False}
    names = ("base", "one", "two")
    cells = {row: {"acc": {"run": run(tmp_path, row, RIGHT, **how)}} for row in names}
    path = store(tmp_path, cells)
    content = json.loads(path.read_text())
    content["suites"] = [content["suites"][0] | {"tasks": tasks}]
    for row in content["rows"][1:]:
        row["trained"] = "same"
    path.write_text(json.dumps(content))
    for scores in tmp_path.glob("evaluations/*/scores.parquet"):
        frame = pd.read_parquet(scores).assign(task=["go", "rust"] * 20)
        frame.loc[frame.task == "go", "value"] = np.nan
        frame.to_parquet(scores)
    report = read(path)
    cell = report.cell("one", "acc")
    assert cell.gain is None
    assert cell.reason == "not measured: no item was scored in Go"
    assert report.seeded == ()


def test_a_suite_that_could_not_be_judged_keeps_its_costs_health_and_notes(tmp_path: Path) -> None:
    health = {"truncated": 0, "unextracted": 0, "tie": 0, "infra": 40}
    how = {"health": health, "notes": ["in a container"]}
    where = run(tmp_path, "base", np.full(40, np.nan), **how)
    report = read(store(tmp_path, {"base": {"acc": {"run": where}, "bits": {"reason": "no"}}}))
    cell = report.cell("base", "acc")
    assert cell.score is None
    assert not cell.partial
    text = markdown(report)
    assert "| base | acc | 0 | 0 | 0 | 0 | 40 |" in text
    assert "| base | evaluate acc | 1.5 s |" in text
    assert "- note: base, acc: in a container" in text
    (line,) = panels(report)["health"].tables[0].rows
    assert line[-1].text == "40"


def test_programs_are_counted_one_by_one(tmp_path: Path) -> None:
    ended = {"programs": 40, "pass": 3, "wrong": 30, "infra": 7, "truncated": 9}
    found = run(tmp_path, "base", RIGHT, programs=ended)
    report = read(store(tmp_path, {"base": {"acc": {"run": found}, "bits": {"reason": "no"}}}))
    text = markdown(report)
    assert "| row | suite | programs | pass | wrong | infra | truncated |" in text
    assert "| base | acc | 40 | 3 | 30 | 7 | 9 |" in text
    (table,) = panels(report)["programs"].tables
    assert list(table.head) == ["row", "suite", "programs", "pass", "wrong", "infra", "truncated"]
    assert [value.text for value in table.rows[0][2:]] == ["40", "3", "30", "7", "9"]


def test_token_perplexities_are_on_the_page_as_in_the_text(tmp_path: Path) -> None:
    found = run(tmp_path, "base", np.linspace(0.9, 1.1, 40), bits=True)
    (scores,) = tmp_path.glob("evaluations/*/scores.parquet")
    frame = pd.read_parquet(scores)
    nats = frame.assign(metric="nats_per_token", value=np.log(12.5))
    pd.concat([frame, nats]).to_parquet(scores)
    report = read(store(tmp_path, {"base": {"acc": {"reason": "no"}, "bits": {"run": found}}}))
    assert "| base | bits | first | 12.50 |" in markdown(report)
    ((*_, value),) = panels(report)["perplexities"].tables[0].rows
    assert (value.text, value.order) == ("12.50", pytest.approx(12.5))


def test_pass_at_ten_stands_beside_the_score_where_samples_are_many(tmp_path: Path) -> None:
    found = run(tmp_path, "base", RIGHT / 2, programs={"programs": 800, "pass": 200, "wrong": 600})
    (scores,) = tmp_path.glob("evaluations/*/scores.parquet")
    frame = pd.read_parquet(scores)
    pd.concat([frame, frame.assign(metric="pass@10", value=RIGHT * 1.0)]).to_parquet(scores)
    report = read(store(tmp_path, {"base": {"acc": {"run": found}, "bits": {"reason": "no"}}}))
    cell = report.cell("base", "acc")
    (ten,) = cell.passes
    assert (ten.title, ten.score, ten.n) == ("pass@10", pytest.approx(RIGHT.mean()), 40)
    assert cell.score == pytest.approx(RIGHT.mean() / 2)
    assert (ten.low, ten.high) == pytest.approx(wilson(RIGHT.sum(), 40))
    said = f"base on acc: pass@10 60.0 [{100 * ten.low:.1f}, {100 * ten.high:.1f}]"
    assert said in markdown(report).replace("\\", "")
    assert panels(report)["programs"].text == (f"{said}.",)
