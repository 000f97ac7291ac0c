"""The page as a browser shows it: sorting, signatures, items, keys, hostile text, size."""

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
from reports.html import page, panels
from reports.panels import Panel
from reports.table import read
from reports.untrusted import clipped, plain, script_json

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>]]>&amp;|`$x$`"
    "\u202eevil\u2028\x00\ud800 --> </textarea></script><!--"
)
SUITES: dict[str, tuple[int, str, bool]] = {  # tasks, metric, whether answers are generated
    "bbh__fusellm": (27, "exact_match", True),
    "multipl_e__fusellm": (10, "pass_at_1", True),
    "commonsense": (5, "acc_norm", False),
    "bits_per_byte": (5, "bits_per_byte", False),
}


def made_up(
    home: Path,
    rows: list[str],
    suites: dict[str, tuple[int, str, bool]] = SUITES,
    items: int = 8,
    hostile: str = "",
    length: int = 300,
) -> Path:
    """A store of made-up runs and the index of their report; `items` questions a task."""
    generator = np.random.default_rng(5)
    index: dict[str, Any] = {"rows": [], "suites": [], "cells": {row: {} for row in rows}}
    prompts: dict[str, Any] = {}
    for suite, (tasks, metric, generated) in suites.items():
        names = [f"{suite}_{number}{hostile}" for number in range(tasks)]
        listed = [
            {"task": name, "title": name, "metric": metric, "chance": 0.25, "shots": 3}
            | {"higher_is_better": metric != "bits_per_byte", "n_total": items, "protocol": "t"}
            for name in names
        ]
        frame = pd.DataFrame({"task": np.repeat(names, items), "doc_id": [*range(items)] * tasks})
        size = len(frame)
        asked = [f"{hostile}Question {i} {'word ' * (length // 5)}" for i in range(size)]
        frame.assign(prompt=asked).to_parquet(home / f"{suite}-prompts.parquet")
        prompts[suite] = {"p1": f"{suite}-prompts.parquet"}
        index["suites"].append({"name": suite, "title": f"Suite {suite}", "tasks": listed})
        for place, row in enumerate(rows):
            folder = home / "evaluations" / f"{place}-{suite}"
            folder.mkdir(parents=True)
            values = (generator.random(size) < 0.4 + 0.02 * place).astype(float)
            if metric == "bits_per_byte":
                values = generator.normal(1.0, 0.1, size)
            scores = frame.assign(cluster=[str(i) for i in range(size)], metric=metric)
            scores = scores.assign(value=values, weight=1.0, outcome="ok")
            scores["extracted"] = [f"{hostile}{v:.0f}" if generated else None for v in values]
            scores.to_parquet(folder / "scores.parquet")
            text = [f"{hostile}Row {place} says {i}: {'so ' * (length // 3)}" for i in range(size)]
            empty: list[list[Any]] = [[] for _ in range(size)]
            samples = frame.assign(
                gold=json.dumps("yes"),
                output_type="generate_until" if generated else "multiple_choice",
                choice_ll=empty if generated else [[-1.0, -2.0, -3.0]] * size,
                choice_chars=empty if generated else [[4, 5, 6]] * size,
                generation=[[t] for t in text] if generated else empty,
                finish_reason=[["stop"]] * size if generated else empty,
            )
            for part in range(0, size, 64):
                name = f"samples-{part // 64:05d}.parquet"
                samples[part : part + 64].to_parquet(folder / name)
            manifest = {
                "kind": "evaluation", "row": row, "suite": suite, "rule": "macro",
                "model_identity": f"model{place:03d}", "protocol": "p1", "seed": 1, "limit": None,
                "partial": False, "dtype": "float32", "lm_eval": "0.4.13", "tasks": listed,
                "health": {"truncated": place, "unextracted": 0, "tie": 0, "infra": 0},
                "engine": {"name": "kfuse", "torch": "2.0"},
                "cost": {"seconds": 1.5, "tokens": 1000, "flops_per_token": 1e9 * (place + 1)},
            }  # fmt: skip
            (folder / "manifest.json").write_text(json.dumps(manifest))
            index["cells"][row][suite] = {"run": str(folder.relative_to(home))}
    for place, row in enumerate(rows):
        index["rows"].append(
            {"name": row, "kind": "train", "summary": f"how {row} is made", "identity": "x"}
            | {"folder": None, "training_log": "training.csv", "target": rows[0]}
            | {"sources": rows[:2] if place > 1 else [], "won": {"one: two": 3, rows[1]: 1}}
            | {"stages": [{"stage": "train", "name": row, "shared_by": 1, "cost": {"seconds": 9}}]}
        )
    (home / "training.csv").write_text(
        "step,tokens,clm,fusion,coverage\n1,10,3.0,0.5,0.9\n2,20,2.5,0.4,0.9\n"
    )
    overlap = {"items": 40, "short": 10, "found": 3, "corpus_words": 1000, "n": 13}
    index |= {
        "recipe": f"demo{hostile}",
        "recipe_yaml": hostile or "sources: {}",
        "overrides": [hostile] if hostile else [],
        "reference": rows[0],
        "facts": {"machine": "m", "packages": {"torch": "2"}, "commit": None, "created": "now"},
        "extra": {
            "prompts": prompts,
            "contamination": [{"suite": next(iter(suites))} | overlap],
            "resolved": "everything: true",
            "seed": 17,
        },
    }
    path = home / "reports" / "demo-1" / "index.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(index))
    return path


class Elements(HTMLParser):
    """What a browser would make of a page, as far as attacks go."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[dict[str, str | None]] = []
        self.images = 0
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "script":
            self.scripts.append(dict(attrs))
        self.images += tag in ("img", "iframe", "object", "embed", "base", "form")
        assert not [k for k, _ in attrs if k.startswith("on")], self.get_starttag_text()

    def handle_data(self, data: str) -> None:
        if self.scripts and self.scripts[-1].get("id") == "data" and not self.data:
            self.data = data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    home = tmp_path_factory.mktemp("made up")
    return read(made_up(home, ["base", "one", "other"], items=6))


@pytest.fixture(scope="module")
def drawn(report: Report) -> dict[str, Panel]:
    return panels(report)


def test_every_panel_with_something_to_show_is_there_and_no_other(
    drawn: dict[str, Panel],
) -> None:
    shown = drawn
    assert list(shown) == [
        "scores", "gains", "bbh", "languages", "tasks", "references", "health", "contamination",
        "items", "training", "wins", "quality", "costs", "stages", "provenance",
    ]  # fmt: skip
    assert all(table.rows for panel in shown.values() for table in panel.tables)
    for panel in shown.values():
        for table in panel.tables:
            assert {len(row) for row in (*table.rows, *table.foot)} == {len(table.head)}


def test_a_report_without_runs_has_no_empty_panel(tmp_path: Path) -> None:
    path = made_up(tmp_path, ["base", "one"], {"commonsense": (1, "acc", False)}, items=2)
    content = json.loads(path.read_text())
    content["cells"] = {
        row: {"commonsense": {"reason": "not built: no corpus"}} for row in content["cells"]
    }
    content["extra"] = {}
    for row in content["rows"]:
        row |= {"training_log": None, "stages": [], "won": None}
    path.write_text(json.dumps(content))
    report = read(path)
    assert list(panels(report)) == ["scores", "provenance"]
    assert "not built: no corpus" in page(report)


def test_sources_reference_lines_and_costs_are_those_of_the_report(
    report: Report, drawn: dict[str, Panel]
) -> None:
    won = drawn["wins"].tables[0].rows
    assert [value.text for value in won[0]][:3] == ["base", "one: two", "75.0"]
    lines = {(x.suite, x.row, x.name): x for x in report.lines}
    of_rows = drawn["references"].tables[1].rows
    assert of_rows
    names = [name.removesuffix(", %") for name in drawn["references"].tables[1].head[2:]]
    assert names == ["gap recovered", "forgotten", "emergent"]
    for row, suite, *values in of_rows:
        for name, shown in zip(names, values, strict=True):
            line = lines.get((suite.text, row.text, name))
            value = line.value if line else None
            assert shown.text == ("–" if value is None else f"{100 * value:.1f}")
            assert shown.order == value
    stages = {(row[0].text, row[1].text): row for row in drawn["stages"].tables[0].rows}
    train = stages["one", "train"]
    assert [value.text for value in train[2:]] == ["9 s", "–", "–", "–", "–", "–", "–"]
    assert stages["one", "evaluate commonsense"][6].text == "1 k"
    sums = {
        row[0].text: [value.text for value in row[1:3]] for row in drawn["costs"].tables[0].rows
    }
    assert sums["one"] == ["9 s", "–"]


def test_seeds_of_a_variant_are_one_line(tmp_path: Path) -> None:
    path = made_up(tmp_path, ["base", "one", "two"], {"commonsense": (2, "acc", False)}, items=20)
    content = json.loads(path.read_text())
    for row in content["rows"][1:]:
        row["trained"] = "same"
    path.write_text(json.dumps(content))
    report = read(path)
    (line,) = panels(report)["seeds"].tables[0].rows
    (found,) = report.seeded
    assert [value.text for value in line[:4]] == ["one, two", "base", "commonsense", "2"]
    assert line[4].order == found.gain
    assert line[5].order == found.seed_error


def test_heat_and_languages_show_differences_to_the_reference(drawn: dict[str, Panel]) -> None:
    table = drawn["bbh"].tables[0]
    assert len(table.rows) == 27
    for line in table.rows:
        base, one = line[1].order, line[2].order
        assert isinstance(base, float)
        assert isinstance(one, float)
        points = 100 * (one - base)
        assert line[2].note == f"{points:+.1f}"
        depth = sum(abs(points) >= step - 1e-6 for step in (2.5, 5, 10, 20))
        word = "more" if points > 0 else "less"
        assert line[2].tone == (f"{word}{depth}" if depth else "")
        assert not line[1].tone
    macro, micro = drawn["languages"].tables[0].foot
    assert macro[1].text == micro[1].text  # languages of one size
    assert "rule:micro" in micro[1].signature


def test_a_row_of_another_protocol_has_no_tint(tmp_path: Path) -> None:
    suites = {name: SUITES[name] for name in ("bbh__fusellm", "multipl_e__fusellm")}
    path = made_up(tmp_path, ["base", "one", "other"], suites)
    for manifest in tmp_path.glob("evaluations/2-*/manifest.json"):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"protocol": "p2"}))
    shown = panels(read(path))
    for line in (*shown["bbh"].tables[0].rows, *shown["languages"].tables[0].rows):
        assert line[2].note
        assert line[3].text != "–"
        assert not line[3].note
        assert not line[3].tone


def test_every_score_says_which_measurement_it_is(drawn: dict[str, Panel]) -> None:
    for name in ("scores", "gains", "bbh", "languages", "tasks", "health", "quality"):
        for table in drawn[name].tables:
            for value in (v for row in (*table.rows, *table.foot) for v in row[1:]):
                if isinstance(value.order, float) and "." in value.text and name != "quality":
                    for part in ("suite:", "@p1", "metric:", "shots:", "n:", "seed:", "dtype:"):
                        assert part in value.signature, (name, value)
                    for part in ("engine:kfuse,torch 2.0", "lm_eval:", "model:"):
                        assert part in value.signature, (name, value)


def test_items_are_those_that_differ_and_counted_whole(
    report: Report, drawn: dict[str, Panel]
) -> None:
    data = drawn["items"].data
    suite = data["suites"][0]
    frames = [
        pd.read_parquet(report.home / report.cell(row, suite["name"]).run / "scores.parquet")
        for row in suite["rows"]
    ]
    for a, one in enumerate(frames):
        for b, other in enumerate(frames):
            assert suite["differ"][a][b] == (one.value != other.value).sum()
    assert suite["items"]
    for item in suite["items"]:
        values = [said[0] for said in item["said"]]
        assert len(set(values)) > 1
        place = frames[0][(frames[0].task == item["task"]) & (frames[0].doc_id == item["id"])]
        assert values == [float(frame.value[place.index[0]]) for frame in frames]
        assert data["texts"][item["asked"][0]].startswith(f"Question {place.index[0]} ")
        assert data["texts"][item["said"][2][2]].startswith(f"Row 2 says {place.index[0]}:")
        assert data["texts"][item["gold"]] == '"yes"'


def test_items_of_a_suite_without_an_average_are_those_of_each_task(tmp_path: Path) -> None:
    path = made_up(tmp_path, ["base", "one"], {"gen": (2, "exact_match", True)}, items=30)
    content = json.loads(path.read_text())
    content["suites"][0]["rule"] = "apart"
    path.write_text(json.dumps(content))
    for manifest in tmp_path.glob("evaluations/*/manifest.json"):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"rule": "apart"}))
    data = panels(read(path))["items"].data
    assert [suite["name"] for suite in data["suites"]] == ["gen/gen_0", "gen/gen_1"]
    for suite in data["suites"]:
        assert {item["task"] for item in suite["items"]} == {suite["name"].removeprefix("gen/")}
        assert suite["differ"][0][1] == len(suite["items"])
        for item in suite["items"]:
            assert all(data["texts"][place].startswith("Question ") for place in item["asked"])
            assert -1 not in item["asked"]


def test_items_keep_to_their_budget(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {}
    for budget in (40_000, 80_000):
        monkeypatch.setattr("reports.items.BUDGET", budget)
        found = panels(report)["items"].data
        sizes[budget] = sum(len(suite["items"]) for suite in found["suites"])
        # The last item of a suite that did not fit leaves its texts behind.
        assert len(script_json(found)) < 1.3 * budget
    assert 0 < sizes[40_000] < sizes[80_000]


def test_rows_that_were_asked_otherwise_are_not_set_side_by_side(tmp_path: Path) -> None:
    path = made_up(tmp_path, ["base", "one", "other"], {"commonsense": (1, "acc", False)}, items=40)
    manifest = tmp_path / "evaluations" / "1-commonsense" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"seed": 2}))
    suite = panels(read(path))["items"].data["suites"][0]
    assert suite["groups"] == [0, 1, 0]
    assert suite["differ"][0][1] == suite["differ"][1][2] == -1
    assert suite["differ"][0][2] > 0


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    path = made_up(tmp_path, ["base", "one"], {"commonsense": (1, "acc", False)}, items=40)
    part = tmp_path / "evaluations" / "0-commonsense" / "samples-00000.parquet"
    part.write_bytes(part.read_bytes()[:200])
    shown = panels(read(path))
    (text,) = shown["items"].text
    assert "0-commonsense/samples-00000.parquet: not a readable" in text
    assert "scores" in shown


def test_hostile_text_never_becomes_markup_or_script(tmp_path: Path) -> None:
    suites = {"bbh": (2, "exact_match", True), "multipl_e": (2, "pass_at_1", True)}
    hostile = HOSTILE.replace("\ud800", "")
    path = made_up(tmp_path, [f"base{hostile}", f"one{hostile}"], suites, 20, hostile)
    content = json.loads(path.read_text())
    content["overrides"] = [HOSTILE]  # JSON can hold half a surrogate pair, Parquet cannot
    path.write_text(json.dumps(content))
    text = page(read(path))
    text.encode()
    assert not re.search("[\x00\u2028\u202e\ud800]", text.partition('id="data"')[2])
    found = Elements()
    found.feed(text)
    assert found.scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not found.images
    browser = json.loads(found.data)["items"]
    assert "<script>alert(1)</script>" in browser["suites"][0]["rows"][0]
    policy = re.search(r"script-src ('[^;]*')", text)
    assert policy
    assert policy.group(1).startswith("'sha256-")
    assert "unsafe" not in policy.group(1)


def test_text_is_made_plain() -> None:
    assert plain("a\x00b\x1b[31m\ud800\u202ec\r\nd\te") == "a␀b␛[31m\ufffd⟨U+202E⟩c\nd\te"
    assert plain("שלום עולם 你好 🍞") == "שלום עולם 你好 🍞"
    long = plain("x" * 1_000_000, 1_000)
    assert len(long) < 1_100
    assert "999,000 characters left out" in long
    assert clipped("short", 10) == "short"
    assert script_json({"a": "</script>\u2028&"}) == (r'{"a":"\u003c/script\u003e\u2028\u0026"}')
    with pytest.raises(ValueError):
        script_json({"a": float("nan")})


def test_a_page_of_twenty_rows_stays_under_three_megabytes(tmp_path: Path) -> None:
    rows = [f"variant-{number}-with-a-name" for number in range(20)]
    path = made_up(tmp_path, rows, items=3, length=100_000)
    text = page(read(path))
    assert len(text.encode()) < 3_000_000
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])
    assert all(suite["items"] for suite in data["items"]["suites"])
