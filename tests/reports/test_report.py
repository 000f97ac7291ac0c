"""Reports from a made-up store: numbers, gaps, refusals and hostile names."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reports.cells import Report
from reports.formats import comma_separated, gain_text, headline, markdown, score_text, terminal
from reports.report import write
from reports.table import read

TASK = {
    "task": "t1",
    "title": "first",
    "metric": "acc",
    "higher_is_better": True,
    "chance": 0.25,
    "shots": 0,
    "n": 40,
    "n_total": 100,
    "protocol": "abc",
}


def run(home: Path, row: str, values: np.ndarray, **changes: Any) -> str:
    """One evaluation folder; its path inside the store."""
    bits = changes.pop("bits", False)
    task = TASK | ({"metric": "bits_per_byte", "higher_is_better": False} if bits else {})
    folder = home / "evaluations" / f"{row.encode().hex()[:20]}-{'bits' if bits else 'acc'}"
    folder.mkdir(parents=True)
    frame = pd.DataFrame(
        {
            "task": "t1",
            "doc_id": range(len(values)),
            "cluster": [str(i) for i in range(len(values))],
            "metric": task["metric"],
            "value": values.astype(float),
            "weight": 1.0,
            "outcome": "ok",
            "extracted": None,
        }
    )
    frame.to_parquet(folder / "scores.parquet")
    manifest = {
        "kind": "evaluation",
        "row": row,
        "suite": "bits" if bits else "acc",
        "rule": "macro",
        "model_identity": row,
        "protocol": "p1",
        "seed": 1,
        "limit": 40,
        "partial": True,
        "dtype": "float32",
        "lm_eval": "0.4.13",
        "tasks": [task],
        "health": {"truncated": 1, "unextracted": 0, "tie": 0, "infra": 0},
        "cost": {"seconds": 1.5, "tokens": 1000},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return str(folder.relative_to(home))


def store(home: Path, runs: dict[str, dict[str, Any]], recipe: str = "r: 1") -> Path:
    folder = home / "reports" / "demo-1234"
    folder.mkdir(parents=True)
    suites = [
        {"name": "acc", "title": "Accuracy", "rule": "macro", "tasks": [TASK]},
        {
            "name": "bits",
            "title": "Bits",
            "rule": "macro",
            "tasks": [TASK | {"metric": "bits_per_byte", "higher_is_better": False}],
        },
    ]
    index = {
        "recipe": "demo",
        "recipe_yaml": recipe,
        "reference": "base",
        "seed": 1,
        "rows": [
            {
                "name": row,
                "kind": "train",
                "summary": f"how {row} is made",
                "identity": "x",
                "folder": None,
                "cost": None,
                "training_log": None,
                "captures": [],
            }
            for row in runs
        ],
        "suites": suites,
        "cells": runs,
        "facts": {"machine": "m", "packages": {"torch": "2"}, "commit": None, "created": "now"},
    }
    path = folder / "index.json"
    path.write_text(json.dumps(index))
    return path


RIGHT = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 1] * 4)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    worse = RIGHT.copy()
    worse[RIGHT.nonzero()[0][:14]] = 0
    noise = np.linspace(0.9, 1.1, 40)
    runs = {
        "base": {
            "acc": {"run": run(tmp_path, "base", RIGHT)},
            "bits": {"run": run(tmp_path, "base", noise, bits=True)},
        },
        "lost": {
            "acc": {"run": run(tmp_path, "lost", worse)},
            "bits": {"run": run(tmp_path, "lost", noise - 0.05 - 0.01 * RIGHT, bits=True)},
        },
        "gap": {
            "acc": {"run": run(tmp_path, "gap", RIGHT)},
            "bits": {"reason": "not built: no corpus"},
        },
    }
    return store(tmp_path, runs)


def text(report: Report, row: str, suite: str) -> str:
    column = next(c for c in report.columns if c.name == suite)
    return gain_text(report.cell(row, suite), column, report.reference)


def test_scores_gains_and_their_direction(index: Path) -> None:
    report = read(index)
    base = report.cell("base", "acc")
    assert base.score == pytest.approx(0.6)
    assert base.low is not None
    assert base.low < 0.6
    lost = report.cell("lost", "acc").gain
    assert lost is not None
    assert lost.value == pytest.approx(-14 / 40)
    assert (lost.better, lost.worse, lost.verdict) == (0, 14, "worse")
    bits = report.cell("lost", "bits").gain
    assert bits is not None
    # Fewer bits are better, so the gain is positive.
    assert bits.value == pytest.approx(0.05 + 0.01 * 0.6)
    assert bits.verdict == "better"
    assert text(report, "lost", "acc").startswith("-35.0 [")
    assert text(report, "lost", "bits").startswith("+0.0560 [")
    assert text(report, "base", "acc") == "reference"
    assert "worse on acc: lost by 35.0 points" in headline(report)


def test_not_measured_is_never_a_number(index: Path) -> None:
    report = read(index)
    cell = report.cell("gap", "bits")
    assert cell.score is None
    assert score_text(cell, report.columns[1]) == "not measured"
    assert "gap/bits: not built: no corpus" in markdown(report)
    line = next(x for x in comma_separated(report).splitlines() if x.startswith("demo,gap,bits"))
    assert line.split(",")[5] == ""


def test_partial_runs_say_how_much(index: Path) -> None:
    text = markdown(read(index))
    assert "partial: 40 of 100 items" in text
    heading = "| row | suite | items | cut at the token limit | no answer found |"
    assert heading in text
    assert "| 40 | 1 | 0 | 0 | 0 |" in text


def test_the_same_rows_are_inconclusive(index: Path) -> None:
    gain = read(index).cell("gap", "acc").gain
    assert gain is not None
    assert gain.value == 0
    assert gain.verdict == "inconclusive"


@pytest.mark.parametrize(
    ("change", "named"),
    [({"protocol": "other"}, "protocol"), ({"dtype": "bfloat16"}, "dtype"), ({"seed": 2}, "seed")],
)
def test_rows_of_another_protocol_are_not_compared(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    gap = {"reason": "not run"}
    runs = {
        "base": {"acc": {"run": run(tmp_path, "base", RIGHT)}, "bits": gap},
        "other": {"acc": {"run": run(tmp_path, "other", RIGHT, **change)}, "bits": gap},
    }
    cell = read(store(tmp_path, runs)).cell("other", "acc")
    assert cell.gain is None
    assert cell.no_gain is not None
    assert f"not comparable: {named}" in cell.no_gain


def test_what_was_scored_another_way_is_said_and_not_compared(tmp_path: Path) -> None:
    gap = {"reason": "not run"}
    how = {"engine": {"name": "hf"}, "notes": ["ALiBi <b>: a row a choice"]}
    mixed = {"engine": {"name": ["kfuse", "hf"]}}
    runs = {
        "base": {"acc": {"run": run(tmp_path, "base", RIGHT)}, "bits": gap},
        "own": {
            "acc": {"run": run(tmp_path, "own", RIGHT, engine={"name": "kfuse"})},
            "bits": gap,
        },
        "other": {"acc": {"run": run(tmp_path, "other", RIGHT, **how)}, "bits": gap},
        "mixed": {"acc": {"run": run(tmp_path, "mixed", RIGHT, **mixed)}, "bits": gap},
    }
    index = store(tmp_path, runs)
    report = read(index)
    assert report.cell("own", "acc").gain is not None
    assert text(report, "other", "acc") == ("not comparable: engine is hf, in the reference kfuse")
    assert "engine is kfuse+hf" in text(report, "mixed", "acc")
    assert "- note: other, acc: ALiBi &lt;b&gt;: a row a choice" in markdown(report).splitlines()
    assert write(index)["html"].read_text().count("ALiBi &lt;b&gt;: a row a choice") == 1


def test_missing_items_and_unscored_ones(tmp_path: Path) -> None:
    gap = {"reason": "not run"}
    half = RIGHT.astype(float)
    half[::2] = np.nan
    runs = {
        "base": {"acc": {"run": run(tmp_path, "base", RIGHT)}, "bits": gap},
        "few": {"acc": {"run": run(tmp_path, "few", RIGHT[:30])}, "bits": gap},
        "half": {"acc": {"run": run(tmp_path, "half", half)}, "bits": gap},
        "none": {"acc": {"run": run(tmp_path, "none", np.full(40, np.nan))}, "bits": gap},
    }
    report = read(store(tmp_path, runs))
    assert "10 items" in str(report.cell("few", "acc").no_gain)
    assert report.cell("half", "acc").n == 20
    assert report.cell("none", "acc").score is None
    assert "no item was scored" in str(report.cell("none", "acc").reason)


def test_without_a_score_on_both_sides_there_is_no_gain(tmp_path: Path) -> None:
    tasks = [TASK | {"task": name, "title": name} for name in ("go", "rust")]
    half = np.full(40, np.nan)
    unjudged = {"base": {"go": RIGHT, "rust": half}, "none": {"go": 1 - RIGHT, "rust": half}}
    unjudged["whole"] = {"go": 1 - RIGHT, "rust": RIGHT}
    gap = {"reason": "not run"}
    runs = {
        row: {"acc": {"run": run(tmp_path, row, RIGHT, tasks=tasks)}, "bits": gap}
        for row in unjudged
    }
    for row, values in unjudged.items():
        path = tmp_path / runs[row]["acc"]["run"] / "scores.parquet"
        frame = pd.read_parquet(path)
        parts = [frame.assign(task=task, value=v.astype(float)) for task, v in values.items()]
        pd.concat(parts).to_parquet(path)
    report = read(store(tmp_path, runs))
    none, whole = report.cell("none", "acc"), report.cell("whole", "acc")
    assert none.reason == "not measured: no item was scored in rust"
    assert none.gain is None
    assert whole.score is not None
    assert whole.gain is None
    assert whole.no_gain == "the reference is not measured: no item was scored in rust"


class Page(HTMLParser):
    """What a browser would make of a page: its tags, and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.scripts: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "script":
            self.scripts.append(dict(attrs))
        names = ("src", "href", "xlink:href")
        self.addresses += [v for k, v in attrs if k in names and v and not v.startswith("#")]
        assert not [k for k, _ in attrs if k.startswith("on")]


HOSTILE = "<script>alert(1)</script>|`$x$`"


def test_hostile_names_never_become_markup(tmp_path: Path) -> None:
    gap = {"reason": f"not built: {HOSTILE}"}
    runs = {
        "base": {"acc": {"run": run(tmp_path, "base", RIGHT)}, "bits": gap},
        HOSTILE: {"acc": {"run": run(tmp_path, HOSTILE, 1 - RIGHT)}, "bits": gap},
    }
    files = write(store(tmp_path, runs, recipe=HOSTILE))
    page = Page()
    page.feed(files["html"].read_text())
    assert page.scripts == [{"type": "application/json", "id": "data"}, {}]
    assert "svg" in page.tags
    assert not page.addresses
    tables = [x for x in files["markdown"].read_text().split("\n\n") if x.startswith("| ")]
    bars = [{len(re.findall(r"(?<!\\)\|", line)) for line in x.splitlines()} for x in tables]
    # The scores, what did not go as meant, costs and stages: no line has more bars than its table.
    assert bars == [{4}, {8}, {8}, {11}]
    rows = pd.read_csv(files["csv"])
    assert HOSTILE in set(rows.row)


def test_a_report_can_be_printed(index: Path) -> None:
    from rich.console import Console

    console = Console(width=140, record=True)
    with console.capture() as shown:
        console.print(terminal(read(index)))
    assert "not measured: gap/bits: not built: no corpus" in shown.get()


def test_a_recipe_named_as_markup_is_text(tmp_path: Path) -> None:
    from rich.console import Console

    gap = {"reason": "absent [/data/x]"}
    path = store(
        tmp_path, {"base": {"acc": gap, "bits": gap}, "fused[top_k=4]": {"acc": gap, "bits": gap}}
    )
    path.write_text(path.read_text().replace('"demo"', '"demo[/x]"'))
    console = Console(width=140)
    with console.capture() as shown:
        console.print(terminal(read(path)))
    for part in ("demo[/x]: gains", "absent [/data/x]", "fused[top_k=4]"):
        assert part in shown.get()


def test_damage_names_the_file(index: Path) -> None:
    (scores,) = index.parent.parent.parent.glob(f"evaluations/{b'lost'.hex()}-acc/scores.parquet")
    scores.write_bytes(scores.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"scores\.parquet: not a readable Parquet"):
        read(index)
    scores.unlink()
    with pytest.raises(FileNotFoundError, match=r"scores\.parquet"):
        read(index)


@pytest.mark.parametrize("name", ["a\n\n<img src=x onerror=y>", "x&lt;b&gt;", "a\rb\u2028c`d"])
def test_no_name_is_markup_or_ends_a_line_in_markdown(tmp_path: Path, name: str) -> None:
    cells = {name: {"acc": {"run": run(tmp_path, name, RIGHT)}, "bits": {"reason": "gone"}}}
    path = store(tmp_path, cells)
    path.write_text(
        path.read_text().replace('"reference": "base"', f'"reference": {json.dumps(name)}')
    )
    text = markdown(read(path))
    assert not any(c in text for c in "\r\u2028")
    (signed,) = (line for line in text.splitlines() if line.startswith("- `"))
    assert signed.count("`") == 2  # between backticks nothing is markup
    rest = text.replace(signed, "")
    assert "<img" not in rest
    assert "x&lt;b" not in rest
