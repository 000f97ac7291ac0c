"""BLEU from stored counts, and suites without an average: each task is a suite of its own.

Oracle: sacrebleu's corpus score and its own paired tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest

from reports import corpus
from reports.calibration import calibrate
from reports.compare import NotComparable, compare
from reports.costs import frame
from reports.formats import comma_separated, markdown
from reports.gate import default, judge
from reports.leaderboard import boards, find_runs
from reports.pairs import open_pairs
from reports.records import Run, apart, read_primary
from reports.table import read
from reports.trust_panels import published

WORDS = ("der", "alte", "Hund", "lief", "schnell", "nach", "Hause", ".")
WORD = st.sampled_from(WORDS)


def counted(said: list[str], references: list[str]) -> Any:
    pairs = zip(said, references, strict=True)
    return np.array([corpus.bleu_counts(a, b)[0] for a, b in pairs], dtype=float)


def texts(seed: int, n: int, keep: float) -> tuple[list[str], list[str]]:
    """References, and copies in which some words are others."""
    draw = np.random.default_rng(seed)
    references = [list(draw.choice(WORDS, size=draw.integers(5, 15))) for _ in range(n)]
    said = [[w if draw.random() < keep else str(draw.choice(WORDS)) for w in r] for r in references]
    return [" ".join(words) for words in said], [" ".join(words) for words in references]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.lists(WORD), st.lists(WORD, min_size=1)), min_size=1, max_size=6))
def test_a_corpus_score_is_sacrebleus(pairs: list[tuple[list[str], list[str]]]) -> None:
    said = [" ".join(a) for a, _ in pairs]
    references = [" ".join(b) for _, b in pairs]
    expected = BLEU().corpus_score(said, [references]).score
    assert 100 * corpus.corpus_score(counted(said, references), "bleu") == pytest.approx(expected)


def test_a_corpus_is_no_mean_of_its_sentences() -> None:
    said, references = texts(0, 50, 0.7)
    alone = [corpus.bleu_counts(a, b)[1] for a, b in zip(said, references, strict=True)]
    assert abs(corpus.corpus_score(counted(said, references), "bleu") - np.mean(alone)) > 0.005


def test_the_p_value_is_that_of_sacrebleus_randomisation() -> None:
    (one, references), (two, same) = texts(1, 120, 0.80), texts(1, 120, 0.76)
    assert references == same
    two = [a if i % 3 else b for i, (a, b) in enumerate(zip(one, two, strict=True))]
    counts = [counted(said, references) for said in (one, two)]
    signs = np.zeros(120)
    found = corpus.paired_corpus(*counts, "bleu", np.random.default_rng(0), signs)
    metric = BLEU(references=[references])
    systems = [("two", two), ("one", one)]
    _, tests = PairedTest(systems, {"BLEU": metric}, None, "ar", 2000)()
    theirs = tests["BLEU"][1]
    assert 100 * found.gain == pytest.approx(theirs.score - tests["BLEU"][0].score)
    assert found.p_value == pytest.approx(theirs.p_value, abs=0.04)


def test_copies_differ_by_nothing_and_one_item_has_no_interval() -> None:
    counts = counted(*texts(2, 30, 0.8))
    generator = np.random.default_rng(0)
    same = corpus.paired_corpus(counts, counts, "bleu", generator, np.zeros(30))
    assert (same.gain, same.low, same.high, same.p_value) == (0.0, None, None, 1.0)
    assert corpus.corpus_interval(counts[:1], "bleu", generator) is None
    low, high = corpus.corpus_interval(counts, "bleu", generator) or (1, 0)
    assert low < corpus.corpus_score(counts, "bleu") < high


def test_few_items_are_swapped_in_all_ways() -> None:
    references = ["der alte Hund lief schnell nach Hause ."] * 3
    good, bad = counted(references, references), counted(["Hund lief"] * 3, references)
    found = corpus.paired_corpus(good, bad, "bleu", np.random.default_rng(0), np.ones(3))
    assert found.p_value == 2 / 8  # only none and all of three swapped are as far apart
    assert (found.better, found.worse) == (3, 0)
    with pytest.raises(ValueError, match="beside"):
        corpus.paired_corpus(good, bad[:2], "bleu", np.random.default_rng(0), np.ones(3))
    with pytest.raises(ValueError, match="no item"):
        corpus.corpus_score(good[:0], "bleu")


TASKS: list[dict[str, Any]] = [
    {"task": "t", "title": "Trivia", "metric": "exact_match", "n_total": 60, "chance": None},
    {"task": "m", "title": "MT", "metric": "bleu", "n_total": 60, "chance": None},
]


def made(home: Path, row: str, keep: float, **changes: Any) -> dict[str, str]:
    """A run of a suite without an average: 60 questions and 60 translations."""
    said, _ = texts(5, 60, keep)
    _, references = texts(5, 60, 1.0)
    scored = [corpus.bleu_counts(a, b) for a, b in zip(said, references, strict=True)]
    table = pd.DataFrame(
        {
            "task": ["t"] * 60 + ["m"] * 60,
            "doc_id": [*range(60), *range(60)],
            "cluster": [str(i) for i in [*range(60), *range(60)]],
            "metric": ["exact_match"] * 60 + ["bleu"] * 60,
            "value": [float(i % 3 == 0) for i in range(60)] + [value for _, value in scored],
            "weight": 1.0,
            "outcome": "ok",
            "extracted": None,
            "counts": [None] * 60 + [counts for counts, _ in scored],
        }
    )
    if "counts" in changes:
        table = table.drop(columns="counts")
    folder = home / "evaluations" / row
    folder.mkdir(parents=True)
    table.to_parquet(folder / "scores.parquet")
    both = {"higher_is_better": True, "shots": 0, "protocol": "p"}
    health = {"truncated": 1, "unextracted": 2, "tie": 0, "infra": 0}
    tasks = [task | both | {"health": health} for task in TASKS]
    manifest = {
        "kind": "evaluation", "row": row, "suite": "gen", "rule": "apart", "protocol": "p1",
        "model_identity": row, "partial": False, "tasks": tasks, "health": health,
        "cost": {"seconds": 3.0},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return {"run": str(folder.relative_to(home))}


@pytest.fixture
def index(tmp_path: Path) -> Path:
    cells = {row: {"gen": made(tmp_path, row, keep)} for row, keep in (("base", 0.5), ("new", 0.9))}
    cells["gone"] = {"gen": {"reason": "not measured: no"}}
    rows = [
        {"name": row, "kind": "source", "summary": row, "cost": None, "training_log": None}
        | {"captures": [], "folder": None}
        for row in cells
    ]
    suite = {"name": "gen", "title": "Generation", "rule": "apart", "tasks": TASKS}
    for task in TASKS:
        task["higher_is_better"] = True
    published = {
        "row": "base", "suite": "gen", "paper": "P", "table": "t", "values": {"m": 0.065},
        "averages": {}, "items": {}, "decimals": 2, "unlike": "nobody knows how",
    }  # fmt: skip
    path = tmp_path / "reports" / "r-1" / "index.json"
    path.parent.mkdir(parents=True)
    content = {"recipe": "r", "recipe_yaml": "", "reference": "base", "rows": rows, "facts": {}}
    content |= {"suites": [suite], "cells": cells, "published": [published]}
    path.write_text(json.dumps(content))
    return path


def test_a_suite_without_an_average_is_reported_task_by_task(index: Path) -> None:
    report = read(index)
    assert [(c.name, c.title) for c in report.columns] == [
        ("gen/Trivia", "Generation: Trivia"),
        ("gen/MT", "Generation: MT"),
    ]
    said, references = texts(5, 60, 0.5)[0], texts(5, 60, 1.0)[1]
    cell = report.cell("base", "gen/MT")
    assert cell.score == pytest.approx(BLEU().corpus_score(said, [references]).score / 100)
    assert cell.low is not None
    assert cell.low < (cell.score or 0) < (cell.high or 0)
    gain = report.cell("new", "gen/MT").gain
    assert gain is not None
    assert (gain.verdict, report.cell("new", "gen/Trivia").gain.verdict) == (  # type: ignore[union-attr]
        "better",
        "inconclusive",
    )
    assert report.cell("gone", "gen/MT").reason == "not measured: no"
    assert dict(cell.health)["unextracted"] == 2
    costs = [dict(report.cell("base", f"gen/{t}").cost) for t in ("Trivia", "MT")]
    assert costs == [{"seconds": 3.0}, {}], "what the whole suite took is said once"
    lines = frame(report).to_dict("records")
    found = [(line["row"], line["of"], line["seconds"]) for line in lines]
    assert found == [("base", "gen", 3.0), ("new", "gen", 3.0)]
    (verdict,) = calibrate(report)
    assert (verdict.verdict, verdict.reason) == ("not comparable", "nobody knows how")
    assert verdict.measured == cell.score
    text = markdown(report)
    assert "gen/MT (%, higher is better)" in text
    assert "average" not in text.lower()
    assert "gen/MT" in comma_separated(report)


def test_published_numbers_stand_beside_the_task_that_has_them(index: Path) -> None:
    content = json.loads(index.read_text())
    (entry,) = content["published"]
    entry["values"] |= {"gone": 0.2}
    content["published"] = [entry, entry | {"row": "new", "values": {"m": 0.265}}]
    content["published"] += [entry | {"row": "gone", "values": {"m": 0.1}}]
    index.write_text(json.dumps(content))
    report = read(index)
    panel = published(report)
    assert panel
    scores, gains = panel.tables
    shown = [[value.text for value in line] for line in scores.rows]
    cell = report.cell("base", "gen/MT")
    assert [line[:3] for line in shown][0] == ["base", "gen", "MT"]
    assert shown[0][4] == f"{100 * (cell.score or 0):.2f}"
    assert scores.rows[0][4].signature == cell.tasks[0].signature
    assert [line[4] for line in shown if line[2] in ("gone", "m")] == ["–", "–"]
    (line,) = gains.rows
    gain = report.cell("new", "gen/MT").gain
    assert gain
    assert [value.text for value in line[:3]] == ["new", "gen, MT", "+20.00"]
    assert line[3].order == gain.value


def test_no_reference_line_or_variants_gain_is_a_mean_of_sentences(index: Path) -> None:
    content = json.loads(index.read_text())
    home = index.parent.parent.parent
    content["cells"]["gone"] = {"gen": made(home, "gone", 0.7)}
    content["rows"][1] |= {"kind": "train", "sources": ["base", "gone"], "trained": "one"}
    content["rows"][2]["trained"] = "one"
    index.write_text(json.dumps(content))
    report = read(index)
    (line,) = [line for line in report.lines if line.suite == "gen/MT"]
    assert line.value is None
    assert "bleu is a score of the whole corpus" in line.reason
    assert {x.name for x in report.lines if x.suite == "gen/Trivia"} >= {"item oracle"}
    assert [found.suite for found in report.seeded] == ["gen/Trivia"]


def test_rows_are_compared_gated_and_ranked_task_by_task(index: Path) -> None:
    home = index.parent.parent.parent
    runs = [str(home / "evaluations" / row) for row in ("base", "new")]
    pairs, _ = open_pairs(runs[0], runs[1], home)
    trivia, translation = [compare(*pair, items=False) for pair in pairs]
    assert (trivia.suite, translation.suite) == ("gen/Trivia", "gen/MT")
    assert translation.total.p_value < 0.001
    assert translation.total.candidate - translation.total.base == pytest.approx(
        translation.total.gain
    )
    assert judge(default(pairs), pairs).outcome in ("pass", "inconclusive")
    found = boards(*find_runs([Path(run) for run in runs]))
    assert [(board.suite, board.lines[0].row) for board in found] == [
        ("gen/Trivia", "base"),
        ("gen/MT", "new"),
    ]
    best = found[1].lines[0]
    assert (best.rank_low, best.rank_high, best.group) == (1, 1, "a")


def test_a_score_without_its_counts_is_refused(tmp_path: Path) -> None:
    made(tmp_path, "old", 0.5, counts=None)
    run = apart(Run.open(tmp_path / "evaluations" / "old"))[1]
    with pytest.raises(ValueError, match=r"bleu of item 0 of m: no 10 counts .*`kfuse rescore`"):
        corpus.stacked(read_primary(run), "bleu")


def test_unlike_runs_of_such_a_suite_say_what_differs(index: Path) -> None:
    home = index.parent.parent.parent
    path = home / "evaluations" / "new" / "manifest.json"
    changed = json.loads(path.read_text())
    changed["tasks"][1]["protocol"] = "other"
    path.write_text(json.dumps(changed))
    pairs, _ = open_pairs(str(home / "evaluations" / "base"), str(path.parent), home)
    with pytest.raises(NotComparable, match=r"m.protocol is other"):
        compare(*pairs[0])
