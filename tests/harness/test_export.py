"""lm-eval's form of our records, held to what lm-eval's own backend writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fusion.errors import RunError
from harness.answering import measure
from harness.evaluate import load
from harness.export import export
from harness.plan import plan
from harness.recipe import parse
from harness.scoring import SharedPrefixLM
from tasks.suite import DEFINITIONS

RECIPE = """
sources: {{model: {{path: {folder}}}}}
evaluate: {{suites: [tiny_choice, tiny_generate, tiny_text]}}
reference: model
"""


def close(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of float32 log-likelihoods, also inside of strings."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    try:
        return float(one) == pytest.approx(float(other), rel=1e-5)
    except (TypeError, ValueError):
        return str(one) == str(other)  # samples hold answers as text


def test_keys_and_values_are_those_of_lm_evals_own_run(
    tiny: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    made = plan(parse(RECIPE.format(folder=tiny["llama"]), "r"), home)
    steps = made.evaluations("model")
    lm, tasks = SharedPrefixLM(str(tiny["llama"])), []
    for step in steps:
        loaded = load(step.name, home, None, 17)
        measure(made, step, loaded, lm)
        tasks += list(loaded.tasks)
    written = export([step.folder for step in steps], tmp_path / "out")
    assert len(written) == len(steps) + len(tasks)
    oracle: Any = lm_eval.simple_evaluate(
        model=HFLM(str(tiny["llama"]), dtype="float32", device="cpu", batch_size=1),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(DEFINITIONS), include_defaults=False),
    )
    for path in written:
        if path.name.startswith("results_"):
            mine = json.loads(path.read_text())
            # lm-eval notes an open model's tokenizer; records are exported without a model.
            known = {"samples", "max_length", "eot_token_id"}
            wanted = {key for key in set(oracle) - known if not key.startswith("tokenizer_")}
            assert wanted <= set(mine)
            for key in ("results", "versions", "n-shot", "higher_is_better", "n-samples"):
                theirs = {task: oracle[key][task] for task in mine["results"]}
                assert close(mine[key], theirs), key
            assert mine["config"]["fewshot_seed"] == 1234
        else:
            task = path.name.removeprefix("samples_").rpartition("_")[0]
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            theirs = oracle["samples"][task]
            assert len(lines) == len(theirs)
            for mine, other in zip(lines, theirs, strict=True):
                assert set(mine) == set(other)
                same = set(mine) - {"arguments", "resps", "filtered_resps", "target"}
                assert all(close(mine[k], json.loads(json.dumps(other[k]))) for k in same)
                text = json.loads(json.dumps(other["filtered_resps"]))
                assert str(mine["target"]) == str(other["target"])
                assert close(mine["filtered_resps"], text)


def test_what_cannot_be_exported_says_why(home: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="missing, so this measurement is unfinished"):
        export([tmp_path], tmp_path / "out")
