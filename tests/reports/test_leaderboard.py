"""Ranks with intervals and groups, columns by protocol, imports, and hostile names."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from reports.compare import NotComparable
from reports.leaderboard import Board, boards, find_runs
from reports.leaderboard_formats import (
    comma_separated,
    html,
    latex,
    machine_readable,
    markdown,
    tex,
)
from reports.lm_eval_results import read_results
from reports.records import Run
from tests.reports.test_compare import RIGHT, change_scores, evaluation


def board(home: Path, rows: dict[str, dict], **changes: object) -> Board:
    folders = [evaluation(home, row, tasks, **changes) for row, tasks in rows.items()]
    (found,) = boards(find_runs(folders)[0])
    return found


def test_the_best_is_first_and_ranks_have_intervals_and_groups(tmp_path: Path) -> None:
    near = RIGHT.copy()
    near[0] = 0
    found = board(tmp_path, {"low": {"a": RIGHT * 0}, "near": {"a": near}, "top": {"a": RIGHT}})
    assert [line.row for line in found.lines] == ["top", "near", "low"]
    assert [line.rank for line in found.lines] == [1, 2, 3]
    top, second, low = found.lines
    assert (top.rank_low, top.rank_high) == (1, 2)
    assert (second.rank_low, second.rank_high) == (1, 2)
    assert (low.rank_low, low.rank_high) == (3, 3)
    assert set(top.group) & set(second.group)
    assert not set(top.group) & set(low.group)
    # Chance is 0.25 in the made-up runs: (0.6 − 0.25) / 0.75.
    assert top.normalised == pytest.approx(0.35 / 0.75)
    assert low.normalised == pytest.approx(-0.25 / 0.75)


def test_equal_rows_share_a_rank_and_cannot_be_told_apart(tmp_path: Path) -> None:
    found = board(tmp_path, {"x": {"a": RIGHT}, "y": {"a": RIGHT}})
    assert [(ln.rank, ln.rank_low, ln.rank_high, ln.group) for ln in found.lines] == [
        (1, 1, 2, "a"),
        (1, 1, 2, "a"),
    ]


def test_fewer_bits_are_first_and_have_no_chance_level(tmp_path: Path) -> None:
    bits = np.linspace(0.9, 1.1, 40)
    rows = {"many": {"a": bits + 0.1}, "few": {"a": bits}}
    found = board(tmp_path, rows, metric="bits_per_byte")
    assert [line.row for line in found.lines] == ["few", "many"]
    assert found.lines[0].normalised is None
    assert "lower is better" in markdown([found])


def test_rows_of_different_protocols_are_never_in_one_column(tmp_path: Path) -> None:
    one = evaluation(tmp_path, "x", {"a": RIGHT})
    two = evaluation(tmp_path, "y", {"a": RIGHT}, protocol="p2")
    three = evaluation(tmp_path, "z", {"a": RIGHT}, dtype="bfloat16")
    found = boards(find_runs([one, two, three])[0])
    assert [[line.row for line in b.lines] for b in found] == [["x"], ["y"], ["z"]]
    assert len({b.protocol for b in found}) == 3


def test_missing_items_and_missing_folders_are_refused(tmp_path: Path) -> None:
    one = evaluation(tmp_path, "x", {"a": RIGHT})
    two = evaluation(tmp_path, "y", {"a": RIGHT})
    change_scores(two, lambda frame: frame.iloc[5:])
    with pytest.raises(NotComparable, match="5 items"):
        boards(find_runs([one, two])[0])
    with pytest.raises(FileNotFoundError, match="no finished run"):
        find_runs([tmp_path / "nowhere"])


def test_a_row_without_scores_has_a_reason_and_no_zero(tmp_path: Path) -> None:
    found = board(tmp_path, {"x": {"a": RIGHT}, "y": {"a": RIGHT}})
    change_scores(
        tmp_path / "evaluations" / f"{b'y'.hex()}-suite", lambda f: f.assign(value=np.nan)
    )
    (found,) = boards(find_runs([tmp_path / "evaluations"])[0])
    assert [line.row for line in found.lines] == ["x"]
    assert "y: not measured: no item was scored in a" in found.note


@pytest.mark.parametrize("metric", ["acc", "bleu"])
def test_rows_that_share_no_scored_item_have_ranks_without_intervals(
    metric: str, tmp_path: Path
) -> None:
    for row in ("x", "y"):
        evaluation(tmp_path, row, {"a": RIGHT}, metric=metric)
    for row, odd in (("x", 0), ("y", 1)):
        counts = [[4, 4, 4, 3, 2, 1, 4, 3, 2, 1]] * len(RIGHT)
        change_scores(
            tmp_path / "evaluations" / f"{row.encode().hex()}-suite",
            lambda f, odd=odd, counts=counts: f.assign(
                value=f.value.where(f.doc_id % 2 == odd), counts=counts
            ),
        )
    (found,) = boards(find_runs([tmp_path / "evaluations"])[0])
    assert [(line.rank_low, line.rank_high, line.group) for line in found.lines] == [
        (None, None, "")
    ] * 2
    assert "no rank intervals and no groups" in found.note
    assert all(text([found]) for text in (markdown, comma_separated, latex, html))


def test_a_folder_named_as_a_table_is_a_folder_of_runs(tmp_path: Path) -> None:
    for name in ("x.csv", "y.json"):
        run = evaluation(tmp_path / name, "x", {"a": RIGHT})
        run.parent.rename(tmp_path / "moved")
        (tmp_path / name).rmdir()
        (tmp_path / "moved").rename(tmp_path / name)
        (found,), imported = find_runs([tmp_path / name])
        assert found.manifest["row"] == "x"
        assert imported == []


RESULTS = {
    "model_name": "org/model|<&_%",
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.01,
                     "acc_norm,none": 0.45, "acc_norm_stderr,none": 0.01},
        "wikitext": {"bits_per_byte,none": 0.9, "bits_per_byte_stderr,none": "N/A"},
        "broken": {"acc,none": "N/A"},
    },
    "n-shot": {"arc_easy": 0}, "versions": {"arc_easy": 1.0},
    "n-samples": {"arc_easy": {"original": 2376, "effective": 2376}},
}  # fmt: skip


def test_result_files_of_lm_eval_are_marked_and_stand_apart(tmp_path: Path) -> None:
    path = tmp_path / "results_2026.json"
    path.write_text(json.dumps(RESULTS))
    one = evaluation(tmp_path, "x", {"arc_easy": RIGHT})
    found = boards(*find_runs([one, path]))
    assert [b.suite for b in found] == ["suite", "arc_easy", "wikitext"]
    line = found[1].lines[0]
    assert (line.score, line.n, line.source) == (0.45, 2376, "imported from lm-eval")
    assert (line.low, line.high) == pytest.approx((0.45 - 0.0196, 0.45 + 0.0196), abs=1e-4)
    assert line.rank_low is None
    assert found[2].lines[0].low is None
    assert "no items" in found[1].note


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"results": {"a": {"x,none": 1}}}'])
def test_files_that_are_no_results_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        read_results(path)


HOSTILE = "a|<b>&_%$#{}~^\\\n\x1b"


def test_hostile_names_stay_in_their_cells_in_every_format(tmp_path: Path) -> None:
    found = board(tmp_path, {HOSTILE: {"a": RIGHT}, "y": {"a": RIGHT * 0}})
    text = markdown([found])
    assert "<b>" not in text
    assert "\x1b" not in text
    table = [x for x in text.splitlines() if x.startswith("| ") and "---" not in x]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {9}
    rows = list(csv.DictReader(io.StringIO(comma_separated([found]))))
    assert rows[0]["row"] == HOSTILE
    assert json.loads(machine_readable([found]))["boards"][0]["lines"][0]["row"] == HOSTILE
    made = latex([found])
    body = next(x for x in made.splitlines() if "textbar" in x)
    assert len(re.findall(r"(?<!\\)&", body)) == 7
    assert tex("a_b%") == r"a\_b\%"
    assert tex("\\{") == r"\textbackslash{}\{"
    assert {r"\toprule", r"\midrule", r"\bottomrule"} <= set(made.splitlines())


def test_the_page_shows_every_row_and_no_markup_of_theirs(tmp_path: Path) -> None:
    found = board(tmp_path, {"<script>alert(1)</script>": {"a": RIGHT}, "y": {"a": RIGHT * 0}})
    text = html([found])
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert text.count('<th scope="row"') == 2
    assert 'data-order="0.6"' in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX on this machine")
def test_the_table_compiles_whatever_rows_are_called(tmp_path: Path) -> None:
    names = [HOSTILE, "[x] row", "ünïcödé–−…", "名前", "'a' \"b\" `c` -- ---", ""]
    rows = {name: {"a": RIGHT, "b_c": RIGHT} for name in names}
    document = "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs,longtable}"
    body = latex([board(tmp_path, rows)] * 2)
    (tmp_path / "t.tex").write_text(f"{document}\\begin{{document}}{body}\\end{{document}}")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"],
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-800:].decode(errors="replace")
    assert (tmp_path / "t.pdf").stat().st_size > 1000


def test_five_hundred_rows(tmp_path: Path) -> None:
    """Five kinds of rows, a hundred of each."""
    g = np.random.default_rng(2)
    kinds = [evaluation(tmp_path, f"kind{i}", {"a": g.random(40) < i / 5}) for i in range(5)]
    opened = [Run.open(kinds[i % 5]) for i in range(500)]
    runs = [Run(r.folder, r.manifest | {"row": f"row{i:03}"}) for i, r in enumerate(opened)]
    (found,) = boards(runs)
    assert len(found.lines) == 500
    assert found.lines[0].rank == 1
    assert all(
        ln.rank_low <= ln.rank <= ln.rank_high
        for ln in found.lines
        if ln.rank_low is not None and ln.rank_high is not None
    )
    assert len(latex([found]).splitlines()) > 500
