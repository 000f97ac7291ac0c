"""Measuring: lm-eval's own run loop as the oracle, interruption, damage, samples of questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import pandas as pd
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fusion.errors import RunError
from harness import packing
from harness.answering import measure
from harness.evaluate import load, sample
from harness.heldout import heldout_suite
from harness.plan import Plan, Step, plan
from harness.recipe import parse
from harness.samples import parts
from harness.scores import rescore
from harness.scoring import SharedPrefixLM
from harness.store import read_manifest
from tasks.suite import DEFINITIONS

SUITES = ("tiny_text", "tiny_choice", "tiny_generate")


def planned(folder: Path, home: Path, *overrides: str) -> Plan:
    text = f"""
sources: {{model: {{path: {folder}}}}}
evaluate: {{suites: [tiny_text, tiny_choice, tiny_generate, tiny_code]}}
reference: model
"""
    return plan(parse(text, "r", overrides), home)


def steps(made: Plan) -> dict[str, Step]:
    return {step.name: step for step in made.evaluations("model")}


def measured(tiny: dict[str, Path], home: Path, name: str, suite: str) -> tuple[Plan, Step]:
    made = planned(tiny[name], home)
    step = steps(made)[suite]
    lm = SharedPrefixLM(str(tiny[name]))
    measure(made, step, load(suite, home, None, 17), lm)
    return made, step


def scores(step: Step) -> pd.DataFrame:
    return pd.read_parquet(step.folder / "scores.parquet")


@pytest.mark.parametrize("name", ["llama", "neox"])
@pytest.mark.parametrize("suite", SUITES)
def test_scores_equal_those_of_lm_evals_own_loop(
    tiny: dict[str, Path], home: Path, name: str, suite: str
) -> None:
    _, step = measured(tiny, home, name, suite)
    loaded = load(suite, home, None, 17)
    manager = TaskManager(include_path=str(DEFINITIONS), include_defaults=False)
    oracle: dict[str, Any] = lm_eval.simple_evaluate(
        model=HFLM(str(tiny[name]), dtype="float32", device="cpu", batch_size=1),
        tasks=list(loaded.tasks),
        task_manager=manager,
        bootstrap_iters=0,
    )["results"]
    frame = scores(step)
    for task in loaded.suite.tasks:
        mine = frame[(frame.task == task.name) & (frame.metric == task.metric)]
        score = (mine.value * mine.weight).sum() / mine.weight.sum()
        (theirs,) = (
            value
            for key, value in oracle[task.name].items()
            if key.split(",")[0] == task.metric and isinstance(value, float)
        )
        # Log-likelihoods agree to float32 rounding; counts of right answers agree exactly.
        tolerance = 1e-6 if task.metric == "bits_per_byte" else 0
        assert score == pytest.approx(theirs, abs=tolerance, rel=0)


def test_an_interrupted_measurement_goes_on_and_ends_the_same(
    tiny: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "CHOICE_ITEMS", 3)
    made, step = measured(tiny, home, "gemma", "tiny_choice")
    whole = scores(step)
    shutil.rmtree(step.folder)
    lm = SharedPrefixLM(str(tiny["gemma"]))
    calls = 0
    score_all = lm.loglikelihood

    def cut_off(requests: list, disable_tqdm: bool = True) -> list:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return score_all(requests)

    monkeypatch.setattr(lm, "loglikelihood", cut_off)
    loaded = load("tiny_choice", home, None, 17)
    with pytest.raises(KeyboardInterrupt):
        measure(made, step, loaded, lm)
    assert len(parts(step.folder)) == 2
    assert read_manifest(step.folder) is None
    # What a kill leaves of a part that was being written:
    damaged = step.folder / "samples-00002.parquet"
    damaged.write_bytes((step.folder / "samples-00001.parquet").read_bytes()[:200])
    monkeypatch.setattr(lm, "loglikelihood", score_all)
    before = lm.forward_tokens
    measure(made, step, load("tiny_choice", home, None, 17), lm)
    assert lm.forward_tokens - before > 0
    pd.testing.assert_frame_equal(scores(step), whole)
    table = pd.concat(pd.read_parquet(p) for p in parts(step.folder))
    assert not table.duplicated(["task", "doc_id"]).any()


def test_scores_come_again_from_records_without_the_model(
    tiny: dict[str, Path], home: Path
) -> None:
    made, step = measured(tiny, home, "llama", "tiny_generate")
    before = scores(step)
    (step.folder / "scores.parquet").unlink()
    rescore(made, step, load("tiny_generate", home, None, 17))
    pd.testing.assert_frame_equal(scores(step), before)


def test_generated_code_is_executed_and_judged(tiny: dict[str, Path], home: Path) -> None:
    _, step = measured(tiny, home, "llama", "tiny_code")
    frame = scores(step)
    assert len(frame) == 3
    assert set(frame.outcome) <= {"wrong", "exception", "compile", "timeout"}
    assert (frame.value == 0).all()


def test_records_hold_what_metrics_need(tiny: dict[str, Path], home: Path) -> None:
    _, step = measured(tiny, home, "llama", "tiny_choice")
    table = pd.concat(pd.read_parquet(p) for p in parts(step.folder))
    row = table.iloc[0]
    assert len(row.choice_ll) == len(row.choice_bytes) == len(row.choice_greedy) > 1
    assert all(value < 0 for value in row.choice_ll)
    manifest = read_manifest(step.folder)
    assert manifest is not None
    assert manifest["cost"]["tokens"] > 0
    assert not manifest["partial"]


def test_a_sample_is_stratified_seeded_and_stable() -> None:
    totals = {"a": 50, "b": 3, "c": 50}
    found = sample(totals, 20, 1)
    assert {task: len(ids) for task, ids in found.items()} == {"a": 9, "b": 3, "c": 8}
    assert found == sample(totals, 20, 1)
    assert found != sample(totals, 20, 2)
    assert sample(totals, None, 1)["a"] == list(range(50))
    assert sample(totals, 1000, 1)["b"] == [0, 1, 2]
    more = sample(totals, 40, 1)
    assert set(found["a"]) <= set(more["a"]), "a larger sample holds the smaller one"


def test_a_limit_below_the_number_of_tasks_measures_no_more(home: Path) -> None:
    loaded = load("bbh81", home, 9, 0)
    assert len(loaded.items) == 9
    assert len(loaded.tasks) == 9
    assert sum(loaded.totals.values()) == 81


def test_a_recipes_own_heldout_text_is_measured_by_domain(tmp_path: Path) -> None:
    text = tmp_path / "own.jsonl"
    rows = [{"domain": d, "text": f"{d} {i}"} for d in ("law", "sea tales") for i in range(3)]
    text.write_text("\n".join(map(json.dumps, rows)))
    suite, data = heldout_suite(str(text), tmp_path)
    loaded = load("bits_per_byte", data, 4, 0, suite)
    assert [task.title for task in suite.tasks] == ["law", "sea tales"]
    assert loaded.totals == {"kfuse_heldout_law": 3, "kfuse_heldout_sea_tales": 3}
    assert sorted({item.prompt.split(" ")[0] for item in loaded.items}) == ["law", "sea"]
    text.write_text('{"text": " "}')
    with pytest.raises(RunError, match=r"corpus.heldout: .* holds no text"):
        heldout_suite(str(text), tmp_path)


def test_an_unknown_stock_task_says_so(home: Path) -> None:
    with pytest.raises(RunError, match="lm_eval:no_such_task"):
        load("lm_eval:no_such_task", home, None, 17)
