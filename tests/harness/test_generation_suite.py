"""`generation@fusellm` from questions to a report, with a model that knows nothing.

Oracles: sacrebleu on the recorded texts, lm-eval's own aggregation of the same answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sacrebleu.metrics.bleu import BLEU

from harness import measuring
from harness.answering import measure
from harness.evaluate import write_as_lm_eval
from harness.measuring import load_suite_data
from harness.plan import Plan, Step, plan
from harness.recipe import parse
from harness.scores import filtered, rescore
from harness.scoring import SharedPrefixLM
from harness.store import read_manifest
from reports.records import Run, apart, read_primary, read_samples
from reports.table import _cell

SUITE = "generation@fusellm"
LIMIT = 20


@pytest.fixture(scope="module")
def made(
    tiny: dict[str, Path], shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Step, Any]:
    """A finished measurement of four questions a task."""
    home = tmp_path_factory.mktemp("home")
    recipe = f"""
sources: {{model: {{path: {tiny["llama"]}}}}}
evaluate: {{suites: ["{SUITE}"], limit: {LIMIT}, data: {shared / "data"}}}
reference: model
"""
    prepared = plan(parse(recipe, "r"), home)
    step = prepared.evaluations("model")[0]
    loaded = load_suite_data(SUITE, home, LIMIT, prepared.recipe.seed, None, str(shared / "data"))
    for item in loaded.items:  # the end of each prompt and a few tokens, or it takes minutes
        for request in item.requests:
            prompt, arguments = request.args
            request.arguments = (prompt[-80:], {**arguments, "max_gen_toks": 8})
    lm = SharedPrefixLM(str(tiny["llama"]), "float32", "cpu")
    measure(prepared, step, loaded, lm)
    return prepared, step, loaded


def test_a_part_of_a_set_is_partial(made: tuple[Plan, Step, Any]) -> None:
    manifest = read_manifest(made[1].folder) or {}
    sizes = {task["title"]: (task["n"], task["n_total"]) for task in manifest["tasks"]}
    assert sizes == {
        "TriviaQA": (4, 17_944),
        "DROP": (4, 9536),
        "LAMBADA": (4, 5153),
        "IWSLT2017": (4, 1138),
        "SciBench": (4, 580),
    }
    assert manifest["partial"]
    assert manifest["rule"] == "apart"
    signatures = [task.get("arithmetic") for task in manifest["tasks"]]
    assert [bool(s) for s in signatures] == [False, False, False, True, False]
    assert "tok:13a" in signatures[3]


def test_bleu_comes_from_the_records(made: tuple[Plan, Step, Any]) -> None:
    run = Run.open(made[1].folder)
    samples = read_samples(run)
    samples = samples[samples.task == "kfuse_iwslt2017"]
    said = [texts[0] for texts in samples.generation]
    gold = [json.loads(text) for text in samples.gold]
    part = apart(run)[3]
    cell = _cell("model", part.manifest["suite"], part, read_primary(part), "")
    assert cell.suite == f"{SUITE}/IWSLT2017"
    assert cell.score == pytest.approx(BLEU().corpus_score(said, [gold]).score / 100)
    assert (cell.n, cell.n_total) == (4, 1138)


def test_an_answer_that_ends_with_its_tokens_is_not_cut(made: tuple[Plan, Step, Any]) -> None:
    run = Run.open(made[1].folder)
    ends = read_samples(run).groupby("task").finish_reason.agg(lambda all_: {x[0] for x in all_})
    assert ends["kfuse_lambada"] == {"length"}
    health = {task["title"]: task["health"] for task in run.manifest["tasks"]}
    assert health["LAMBADA"]["truncated"] == 0
    total = sum(entry["truncated"] for entry in health.values())
    assert run.manifest["health"]["truncated"] == total > 0


def test_scores_come_again_without_the_model(made: tuple[Plan, Step, Any]) -> None:
    prepared, step, loaded = made
    before = (step.folder / "scores.parquet").read_bytes()
    (step.folder / "scores.parquet").unlink()
    rescore(prepared, step, loaded)
    assert (step.folder / "scores.parquet").read_bytes() == before


def test_lm_evals_own_aggregation_agrees(made: tuple[Plan, Step, Any], tmp_path: Path) -> None:
    _, step, loaded = made
    filtered(step, loaded)
    write_as_lm_eval(loaded, "model", tmp_path)
    (path,) = tmp_path.rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]
    frame = pd.read_parquet(step.folder / "scores.parquet")
    for task in loaded.suite.tasks:
        run = next(
            r for r in apart(Run.open(step.folder)) if r.manifest["tasks"][0]["task"] == task.name
        )
        cell = _cell("model", run.manifest["suite"], run, read_primary(run), "")
        scale = 100 if task.metric == "bleu" else 1
        assert scale * (cell.score or 0) == pytest.approx(
            theirs[task.name][f"{task.metric},{task.filter}"]
        )
    f1 = frame[(frame.task == "kfuse_drop") & (frame.metric == "f1")].value.mean()
    assert f1 == pytest.approx(theirs["kfuse_drop"]["f1,none"])


def test_a_whole_set_is_counted_as_it_is(made: tuple[Plan, Step, Any]) -> None:
    loaded = made[2]
    before = dict(loaded.totals)
    measuring._count_whole(loaded)
    assert loaded.totals == before
