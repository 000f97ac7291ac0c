"""lm-eval's own models as an opt-in, and our model in lm-eval's own command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from lm_eval.api import registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fusion.errors import RecipeError, RunError
from harness import scoring
from harness.backends import StockLM
from harness.measuring import measure_rows
from harness.plan import Plan, Step, plan
from harness.recipe import parse
from harness.scoring import Instance, SharedPrefixLM
from harness.store import read_manifest
from reports.signature import differences, signature
from tasks.suite import DEFINITIONS


def planned(
    folder: Path, home: Path, backend: str, suite: str = "tiny_choice"
) -> tuple[Plan, Step]:
    text = f"sources: {{model: {{path: {folder}}}}}\nreference: model\nmachine: {{device: cpu}}\n"
    text += f"evaluate: {{suites: [{suite}], backend: {backend}}}\n"
    made = plan(parse(text, "r"), home)
    return made, made.evaluations("model")[0]


def scores(step: Step) -> pd.DataFrame:
    frame = pd.read_parquet(step.folder / "scores.parquet")
    return frame.set_index(["task", "doc_id", "metric"]).value.sort_index()


@pytest.mark.parametrize("suite", ["tiny_choice", "tiny_generate"])
def test_lm_evals_hf_comes_to_our_scores_and_is_not_compared_with_them(
    tiny: dict[str, Path], tmp_path: Path, suite: str
) -> None:
    found = {}
    for backend in ("kfuse", "hf"):
        made, step = planned(tiny["llama"], tmp_path, backend, suite)
        assert measure_rows(made, {"model": [step]}) == {}
        manifest = read_manifest(step.folder)
        assert manifest
        assert manifest["engine"]["name"] == backend
        assert manifest["cost"]["tokens"] > 0
        found[backend] = (step, manifest)
    (ours, mine), (theirs, other) = found["kfuse"], found["hf"]
    assert ours.folder != theirs.folder
    pd.testing.assert_series_equal(scores(ours), scores(theirs))
    assert "|engine:kfuse," in signature(mine, 1, 1)
    assert "|engine:hf," in signature(other, 1, 1)
    assert differences(other, mine) == ["engine is hf, in the reference kfuse"]
    assert differences(other, other) == []
    assert other["notes"] == ["scored by lm-eval's hf, as the recipe asks"]
    assert mine["health"] == other["health"]


def test_samples_are_the_same_again_and_the_global_generator_is_left_alone(
    tiny: dict[str, Path],
) -> None:
    import torch

    lm = StockLM(str(tiny["llama"]), "hf", "float32", "cpu", 17)
    how = {"until": ["never-said"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = [Instance("generate_until", {}, ("The baker", how), 0) for _ in range(3)]
    before = torch.random.get_rng_state()
    texts = lm.generate(requests)
    assert len({made.text for made in texts}) > 1
    assert lm.generate(requests) == texts
    assert torch.equal(before, torch.random.get_rng_state())
    lm.seed = 18
    assert lm.generate(requests) != texts


class FakeVLLM(HFLM):
    """What lm-eval would load as "vllm", with the arguments that vLLM takes and no others."""

    given: dict[str, object] = {}

    def __init__(self, pretrained: str, dtype: str, batch_size: str) -> None:
        type(self).given = {"dtype": dtype, "batch_size": batch_size}
        super().__init__(pretrained, dtype=dtype, device="cpu", batch_size=4)


def test_vllm_is_passed_through(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.model_registry._objs, "vllm", FakeVLLM)
    monkeypatch.setattr("harness.backends.version", lambda name: f"{name}-9")
    made, step = planned(tiny["llama"], tmp_path, "vllm")
    assert measure_rows(made, {"model": [step]}) == {}
    assert FakeVLLM.given == {"dtype": "float32", "batch_size": "auto"}
    manifest = read_manifest(step.folder)
    assert manifest
    assert (manifest["engine"]["name"], manifest["engine"]["vllm"]) == ("vllm", "vllm-9")


def test_vllm_that_is_not_there_says_what_to_install(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RunError, match=r"vllm cannot be imported.*pip install 'lm-eval\[vllm\]'"):
        StockLM(str(tiny["llama"]), "vllm", "float32", "cpu", 17)


def test_a_backend_that_is_unknown_or_cannot_be_shared_out_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"evaluate.backend.*'sglang' is unknown"):
        planned(tmp_path, tmp_path, "sglang")
    text = "sources: {m: {path: x}}\nreference: m\nmachine: {shards: 2}\n"
    with pytest.raises(RecipeError, match=r"machine.shards +backend vllm runs in one process"):
        parse(text + "evaluate: {suites: [tiny_choice], backend: vllm}\n", "r")


class OwnTasks(TaskManager):
    """lm-eval's, without the seconds that its 13,000 stock tasks take to list."""

    def __init__(self, **how: Any) -> None:
        super().__init__(include_defaults=False, **how)


def test_lm_evals_own_command_line_knows_us(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, step = planned(tiny["llama"], tmp_path, "kfuse")
    assert measure_rows(made, {"model": [step]}) == {}
    ours = scores(step).groupby(["task", "metric"]).mean()
    asked = ["lm_eval", "--model", "kfuse", "--model_args", f"pretrained={tiny['llama']}"]
    asked += ["--tasks", "kfuse_tiny_science,kfuse_tiny_yes_no"]
    asked += ["--include_path", str(DEFINITIONS), "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", asked)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", OwnTasks)
    scoring.main()
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    compared = 0
    for (task, metric), value in ours.items():
        assert results[task][f"{metric},none"] == pytest.approx(value)
        compared += 1
    assert compared >= 3


def test_an_argument_of_the_command_line_that_is_unknown_is_refused(tiny: dict[str, Path]) -> None:
    with pytest.raises(TypeError, match="dtpye"):
        SharedPrefixLM.create_from_arg_string(f"pretrained={tiny['llama']},dtpye=bfloat16")
