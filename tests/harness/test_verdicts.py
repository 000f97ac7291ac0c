"""The verdict commands: exit codes, files and messages."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.cli import main
from reports.items import items
from reports.table import read
from tasks.published import PUBLISHED, Published
from tasks.suite import load_suite
from tests.reports.test_compare import RIGHT, evaluation, index


def kfuse(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command."""
    monkeypatch.setattr("sys.argv", ["kfuse", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_compare_prints_and_writes_the_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = evaluation(tmp_path, "base", {"a": RIGHT})
    other = evaluation(tmp_path, "candidate", {"a": np.ones(100)})
    table = tmp_path / "items.csv"
    assert kfuse(monkeypatch, "compare", one, other, "--csv", table) == 0
    assert "# candidate against base" in capsys.readouterr().out
    assert len(table.read_text().splitlines()) == 41


def test_what_cannot_be_compared_is_a_sentence_and_exit_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = evaluation(tmp_path, "base", {"a": RIGHT})
    other = evaluation(tmp_path, "candidate", {"a": RIGHT}, seed=5)
    assert kfuse(monkeypatch, "compare", one, other) == 1
    assert "seed is 5, in the reference 1" in capsys.readouterr().err
    assert kfuse(monkeypatch, "compare", one, "nothing") == 1
    assert "no run folder" in capsys.readouterr().err


GATE = """
rules:
  - {suite: suite, kind: non_inferiority, margin: 0.05}
  - {suite: suite, kind: no_harm, margin: 0.2}
"""


def test_a_gate_passes_fails_or_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text(GATE)
    base = evaluation(tmp_path, "base", {"a": RIGHT, "b": RIGHT})
    near = RIGHT.copy()
    near[:10] = 1 - near[:10]
    rows = {
        "same": ({"a": RIGHT, "b": RIGHT}, 0),
        "lost": ({"a": RIGHT * 0, "b": RIGHT}, 1),
        "near": ({"a": near, "b": near}, 3),
    }
    for row, (tasks, code) in rows.items():
        other = evaluation(tmp_path, row, tasks)
        summary, junit = tmp_path / f"{row}.md", tmp_path / f"{row}.xml"
        files = ("--gate", gate, "--markdown", summary, "--junit", junit)
        assert kfuse(monkeypatch, "gate", base, other, *files) == code, row
        text = summary.read_text()
        assert text.index("## What these items can show") < text.index("## Verdict")
        suite = ET.parse(junit).getroot()
        assert suite.get("tests") == "3"
        assert int(suite.get("failures") or 0) == (2 if row == "lost" else 0)
        assert (int(suite.get("skipped") or 0) > 0) == (row == "near")
    capsys.readouterr()


def test_without_a_gate_file_no_suite_may_lose_two_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = evaluation(tmp_path, "base", {"a": RIGHT})
    assert kfuse(monkeypatch, "gate", base, base) == 3
    assert "loses at most 2.0 points" in capsys.readouterr().out
    many = evaluation(tmp_path, "many", {"a": np.tile(RIGHT, 20)}, suite="large")
    assert kfuse(monkeypatch, "gate", many, many) == 0


def test_all_mistakes_of_a_gate_file_come_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = evaluation(tmp_path, "base", {"a": RIGHT})
    gate = tmp_path / "gate.yaml"
    gate.write_text(
        "alpa: 0.1\nrules:\n  - {suite: suit, kind: non_inferiority, margin: -1}\n"
        "  - {suite: suite, kind: better}\n  - {suite: suite, kind: superiority, margin: 0.1}\n"
        "  - {suite: suite, kind: no_harm, margin: 0.1, tasks: [aa]}\n"
    )
    assert kfuse(monkeypatch, "gate", base, base, "--gate", gate) == 2
    said = capsys.readouterr().err
    assert "6 problems" in said
    for part in ("alpa", "(alpha?)", "rules[0].suite", "(suite?)",
                 "rules[0].margin", "rules[1].kind", "known: 'superiority'",
                 "superiority has no margin", "rules[3].tasks[0]"):  # fmt: skip
        assert part in said, part


@pytest.mark.parametrize("text", ["", "rules: [", "- 1", "rules: []", "rules: 3", "\x00"])
def test_files_that_are_no_gate_are_exit_two(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = evaluation(tmp_path, "base", {"a": RIGHT})
    gate = tmp_path / "gate.yaml"
    gate.write_text(text)
    assert kfuse(monkeypatch, "gate", base, base, "--gate", gate) == 2
    assert "gate.yaml" in capsys.readouterr().err


def test_runs_that_cannot_be_compared_are_exit_two_of_a_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = evaluation(tmp_path, "base", {"a": RIGHT})
    other = evaluation(tmp_path, "other", {"a": RIGHT}, protocol="p2")
    assert kfuse(monkeypatch, "gate", base, other) == 2
    assert "protocol is p2" in capsys.readouterr().err
    assert kfuse(monkeypatch, "gate", base, tmp_path / "none") == 2
    manifest = base / "manifest.json"
    manifest.write_text(json.dumps({"kind": "model"}))
    assert kfuse(monkeypatch, "gate", base, other) == 2


def test_suites_without_a_score_are_named_and_the_others_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFUSE_HOME", str(tmp_path))
    cells: dict[str, dict[str, dict[str, str]]] = {}
    values = {"suite": RIGHT, "unjudged": np.full(100, np.nan), "lost": RIGHT}
    for row in ("base", "new"):
        cells[row] = {"gone": {"reason": f"not built: {row}"}, "half": {"reason": "no memory"}}
        for suite, value in values.items():
            folder = evaluation(tmp_path, row, {"a": value}, suite=suite)
            folder = folder.rename(folder.parent / f"{row}-{suite}")
            cells[row][suite] = {"run": str(folder.relative_to(tmp_path))}
    listed = index(tmp_path, cells)
    assert kfuse(monkeypatch, "compare", "base", "new") == 0
    said = capsys.readouterr().out
    assert said.index("## lost") < said.index("## Not compared") < said.index("- gone: base: not b")
    assert "- unjudged: new cannot be compared with base: no item was scored" in said
    junit = tmp_path / "gate.xml"
    assert kfuse(monkeypatch, "gate", "base", "new", "--junit", junit) == 3
    said = capsys.readouterr().out
    assert said.count("loses at most 2.0 points") == 4  # two claims, in two tables
    assert "- unjudged: new cannot be compared" in said
    names = [case.get("name") for case in ET.parse(junit).getroot()]
    assert names[2:] == ["gone", "half", "unjudged"]
    part = {"a": RIGHT, "b": np.full(100, np.nan)}  # a task that both lack, in a suite with scores
    for row in ("base", "new"):
        folder = evaluation(tmp_path, row, part, suite="half")
        cells[row]["half"] = {"run": str(folder.relative_to(tmp_path))}
    listed.write_text(json.dumps({"cells": cells}))
    assert kfuse(monkeypatch, "gate", "base", "new") == 2
    assert "half: new cannot be compared with base: no item of b" in capsys.readouterr().err
    cells["new"]["half"] = {"reason": "no memory"}
    listed.write_text(json.dumps({"cells": cells}))
    assert kfuse(monkeypatch, "gate", "base", "new") == 2
    assert "half: new: no memory; name the suites" in capsys.readouterr().err
    cells["base"]["half"] = cells["new"]["half"]
    listed.write_text(json.dumps({"cells": cells}))
    path = tmp_path / cells["new"]["lost"]["run"] / "scores.parquet"
    pd.read_parquet(path).assign(value=np.nan).to_parquet(path)
    assert kfuse(monkeypatch, "gate", "base", "new") == 2  # new may have failed: not a yes
    assert "lost: new cannot be compared with base" in capsys.readouterr().err
    assert kfuse(monkeypatch, "compare", "base", "new") == 0
    path = tmp_path / cells["new"]["suite"]["run"] / "scores.parquet"
    pd.read_parquet(path).assign(value=np.nan).to_parquet(path)
    assert kfuse(monkeypatch, "compare", "base", "new") == 1


def test_hostile_names_stay_text_in_junit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "<a&b>\x1b|]]>"
    base = evaluation(tmp_path, hostile, {hostile: RIGHT})
    junit = tmp_path / "out.xml"
    kfuse(monkeypatch, "gate", base, base, "--junit", junit)
    assert "<a&b>" in (ET.parse(junit).getroot().get("name") or "")
    assert "\x1b" not in capsys.readouterr().out


def test_runs_without_a_recipe_make_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFUSE_HOME", str(tmp_path))
    one = evaluation(tmp_path, "base", {"a": RIGHT})
    other = evaluation(tmp_path, "candidate", {"a": np.ones(100)})
    evaluation(tmp_path, "candidate", {"b": RIGHT}, suite="second")
    where = tmp_path / "evaluations"
    asked = [{"task": "a", "doc_id": i, "prompt": f"Is {i} even?"} for i in range(100)]
    (tmp_path / "data").mkdir()
    pd.DataFrame(asked).to_parquet(tmp_path / "data" / "prompts-p1.parquet")
    assert kfuse(monkeypatch, "report", where, "--reference", "base", "--name", "mine") == 0
    said = capsys.readouterr().out
    assert "better on suite: candidate by 40.0 points" in said
    (index,) = (tmp_path / "reports").glob("mine-*/index.json")
    assert "not measured" in (index.parent / "report.md").read_text()
    assert "Is 1 even?" in (index.parent / "report.html").read_text()
    assert kfuse(monkeypatch, "compare", "base", "candidate", "--report", "mine") == 0
    assert kfuse(monkeypatch, "report", one, other, "--reference", "nobody") == 2
    assert "rows: base, candidate" in capsys.readouterr().err
    assert kfuse(monkeypatch, "report", "tiny", "--reference", "nobody") == 2
    assert "belong to folders of runs" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["apart", "macro"])
def test_runs_of_two_versions_of_a_suite_stand_in_one_report(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFUSE_HOME", str(tmp_path))
    evaluation(tmp_path, "old", {"a": RIGHT, "gone": RIGHT}, rule=rule)
    evaluation(tmp_path, "new", {"new": RIGHT, "a": 1 - RIGHT}, rule=rule, protocol="p2")
    evaluation(tmp_path, "third", {"a": RIGHT, "gone": 1 - RIGHT}, rule=rule)
    assert kfuse(monkeypatch, "report", tmp_path / "evaluations", "--reference", "old") == 0
    (index,) = (tmp_path / "reports").glob("*/index.json")
    report = read(index)
    cells = {(r["name"], c.name): report.cell(r["name"], c.name) for r in report.rows
             for c in report.columns}  # fmt: skip
    assert set(cells) == set(report.cells)
    if rule == "macro":
        assert [cell.reason for cell in cells.values()] == [None] * 3
        return
    assert {suite for _, suite in cells} == {"suite/a", "suite/gone", "suite/new"}
    gap = cells["old", "suite/new"].reason
    assert gap == "not measured: this row's run of the suite has no such task"
    assert [bool(cell.reason) for cell in cells.values()].count(True) == 3
    panel = items(report)
    assert panel is not None
    (differ,) = panel.data["suites"]  # in the one task that two comparable rows differ on
    assert (differ["name"], {item["task"] for item in differ["items"]}) == ("suite/gone", {"gone"})


def test_a_corpus_without_counts_or_without_a_mean_is_a_sentence_and_exit_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = evaluation(tmp_path, "base", {"a": RIGHT, "b": RIGHT}, metric="bleu")
    other = evaluation(tmp_path, "candidate", {"a": RIGHT, "b": RIGHT}, metric="bleu")
    for command in (("compare", one, other), ("leaderboard", one, other)):
        assert kfuse(monkeypatch, *command) == 1
        assert "derive the scores again with `kfuse rescore`" in capsys.readouterr().err
    for folder in (one, other):
        frame = pd.read_parquet(folder / "scores.parquet")
        counts = [[4, 4, 4, 3, 2, 1, 4, 3, 2, 1]] * len(frame)
        frame.assign(counts=counts).to_parquet(folder / "scores.parquet")
    assert kfuse(monkeypatch, "compare", one, other) == 1
    assert "suite: bleu have no mean over items" in capsys.readouterr().err
    assert kfuse(monkeypatch, "leaderboard", one, other) == 0
    assert "no rank intervals and no groups" in capsys.readouterr().out


def test_a_run_without_items_and_a_folder_in_a_files_place_are_exit_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluation(tmp_path, "base", {"a": RIGHT}, partial=True)
    frame = pd.read_parquet(run / "scores.parquet")
    frame[:0].to_parquet(run / "scores.parquet")
    assert kfuse(monkeypatch, "leaderboard", run) == 1
    assert "scores.parquet: no item; evaluate the row again" in capsys.readouterr().err
    (run / "manifest.json").rename(tmp_path / "kept")
    (tmp_path / "folder.csv").mkdir()
    assert kfuse(monkeypatch, "leaderboard", tmp_path / "folder.csv") == 1
    assert "no finished run, report or lm-eval result is here" in capsys.readouterr().err


def test_a_report_of_runs_has_the_suites_second_average_and_says_who_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFUSE_HOME", str(tmp_path))
    suite = load_suite("multipl_e@fusellm")
    go, other = suite.without[0], next(t.name for t in suite.tasks if t.name not in suite.without)
    tasks = {go: RIGHT * 0, other: RIGHT}
    one = evaluation(tmp_path, "base", tasks, suite="multipl_e@fusellm")
    assert kfuse(monkeypatch, "report", one, "--name", "mine") == 0
    (index,) = (tmp_path / "reports").glob("mine-*/index.json")
    assert f"without {go} 60.0" in (index.parent / "report.md").read_text().replace("\\", "")
    page = (index.parent / "report.html").read_text()
    assert f"without {go} 60.0" in page
    assert "reported on " in page


def test_runs_that_claim_one_place_or_cannot_be_read_are_exit_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFUSE_HOME", str(tmp_path))
    one = evaluation(tmp_path, "base", {"a": RIGHT})
    again = evaluation(tmp_path / "copy", "base", {"a": RIGHT})
    assert kfuse(monkeypatch, "report", one, again) == 1
    assert "two runs" in capsys.readouterr().err
    (one / "scores.parquet").write_bytes(b"PAR1")
    assert kfuse(monkeypatch, "report", one) == 1
    assert "scores.parquet" in capsys.readouterr().err
    assert kfuse(monkeypatch, "report", tmp_path / "copy") == 2  # no runs in it, and no recipe


def test_published_numbers_have_a_column_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluation(tmp_path, "base", {"a": RIGHT}, suite="bbh@fusellm")
    assert kfuse(monkeypatch, "leaderboard", run, "--published") == 0
    said = capsys.readouterr().out
    assert "published: FuseLLM 2401.10491, table 1, average" in said
    assert "published: FuseLLM 2401.10491, table 6, average" in said
    assert said.count("## bbh@fusellm") == 3
    assert "41.8" in said  # table 1's average of FuseLLM, 41.75


def test_a_number_that_was_not_printed_has_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"x": (math.nan, 41.0, 42.0)}
    table = Published("P 1", "table 9", {}, own, {}, models=("a", "b", "c"))
    monkeypatch.setitem(PUBLISHED, "bbh@fusellm", (table,))
    run = evaluation(tmp_path, "base", {"a": RIGHT}, suite="bbh@fusellm")
    assert kfuse(monkeypatch, "leaderboard", run, "--published", "--format", "csv") == 0
    said = capsys.readouterr().out
    assert "42" in said
    assert "nan" not in said
    assert said.count("published: P 1, table 9, x") == 2


def test_a_margin_makes_equivalent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = evaluation(tmp_path, "base", {"a": RIGHT})
    assert kfuse(monkeypatch, "compare", base, base, "--margin", "0.2") == 0
    assert "| equivalent |" in capsys.readouterr().out
    assert kfuse(monkeypatch, "compare", base, base, "--margin", "0.001") == 0
    assert "| inconclusive |" in capsys.readouterr().out


def test_a_leaderboard_in_every_format_and_an_unknown_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation(tmp_path, "x", {"a": RIGHT})
    evaluation(tmp_path, "y", {"a": RIGHT * 0})
    signs = {
        "markdown": r"| 1 \[1, 1\] | x |",
        "csv": "suite,protocol",
        "latex": "toprule",
        "html": "<caption>suite (%",
    }
    for form, sign in (signs | {"json": '"boards"'}).items():
        where = tmp_path / "evaluations"
        assert kfuse(monkeypatch, "leaderboard", where, "--format", form) == 0
        assert sign in capsys.readouterr().out
    assert kfuse(monkeypatch, "leaderboard", tmp_path / "evaluations", "--format", "pdf") == 2
    assert "known: markdown, csv, latex, html, json" in capsys.readouterr().err
    assert kfuse(monkeypatch, "leaderboard", tmp_path / "nowhere") == 1
    assert "no finished run" in capsys.readouterr().err
