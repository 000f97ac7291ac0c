"""What `kfuse plan` says before any compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fusion import rates
from fusion.errors import RecipeError, RunError
from fusion.flops import forward, size, training
from fusion.models import skeleton
from harness import forecast as module
from harness.build import build
from harness.forecast import Forecast, Work, forecast
from harness.forecast_table import duration, sums, table
from harness.plan import plan
from harness.questions import Questions
from harness.recipe import parse
from harness.run import foresee, overview, pending

TEXT = """
sources:
  llama: {path: "tiny:llama"}
  gemma: {path: "tiny:gemma"}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 600}
variants:
  clm: {train: {init: llama}}
  fused: {train: {init: llama, fuse: {sources: [gemma], function: min_ce, clm_weight: 0.9}}}
  pack: {ensemble: {members: [llama, gemma], rule: mean_probability}}
evaluate: {suites: [tiny_choice, tiny_generate]}
reference: clm
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Forecast:
    """With both sources here and nothing else."""
    planned = plan(parse(TEXT, "r"), tmp_path_factory.mktemp("home"))
    build(planned, ["llama", "gemma"])
    planned = plan(planned.recipe, planned.home)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ROWS": 1, "LENGTH": 16, "SECONDS": 0.05}.items():
            patch.setattr(rates, name, value)
        return forecast(planned, pending(planned, planned.recipe.rows, ("build", "evaluate")))


def work(found: Forecast, stage: str, name: str) -> Work:
    return next(w for w in found.work if w.stage == stage and w.name == name)


def test_flops_are_those_of_full_blocks(found: Forecast, tiny: dict[str, Path]) -> None:
    lengths = [64] * 9 + [24]
    gemma, llama = (size(skeleton(tiny[name])) for name in ("gemma", "llama"))
    assert work(found, "capture", "gemma").flops == forward(gemma, lengths)
    assert work(found, "train", "clm").flops == training(llama, lengths)
    weights = sum(weight.numel() for weight in skeleton(tiny["llama"]).parameters())
    assert work(found, "train", "clm").memory == 16 * weights


def test_an_ensemble_takes_the_sum_of_its_members(found: Forecast) -> None:
    for suite in ("tiny_choice", "tiny_generate"):
        parts = [work(found, "evaluate", f"{row} · {suite}") for row in ("llama", "gemma")]
        whole = work(found, "evaluate", f"pack · {suite}")
        assert whole.flops == pytest.approx(sum(p.flops or 0 for p in parts), abs=2)
        assert whole.tokens == pytest.approx(sum(p.tokens or 0 for p in parts), abs=2)


def test_what_a_suite_can_show_falls_with_the_root_of_its_questions(found: Forecast) -> None:
    one = next(q for q in found.questions if q.suite == "tiny_choice")
    assert one.detectable is not None
    low, high = one.detectable
    # Unlike tasks: 1/H·√Σ 1/n in place of √1/n.
    spread = (1 / 2) * (1 / 8 + 1 / 4) ** 0.5
    assert low == pytest.approx(2.8016 * 0.05**0.5 * spread, rel=1e-3)
    assert high == pytest.approx(2 * low)


def test_it_takes_time_and_says_so(found: Forecast) -> None:
    assert all(w.seconds is not None and w.seconds > 0 for w in found.work if w.flops)
    text = table(found)
    for part in ("smallest gain shown", "clm, 2 suites", "in all: about", "GiB that are free"):
        assert part in text


def test_what_is_not_here_is_unknown_and_not_zero(home: Path) -> None:
    planned = plan(parse(TEXT, "r"), home)
    steps = pending(planned, planned.recipe.rows, ("build", "evaluate"))
    nothing = forecast(planned, steps, "h100")
    assert all(w.flops is None and w.memory is None for w in nothing.work)
    assert "not counted: 13 of 13 pieces" in sums(nothing)


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_what_cannot_fit_is_refused_with_a_remedy(found: Forecast, stage: str) -> None:
    assert found.refusals == []
    least = max(w.memory or 0 for w in found.work if w.stage == stage)
    (refusal, *_) = replace(found, memory_total=least - 1).refusals
    assert "of memory are needed" in refusal
    disk = sum(w.disk for w in found.work)
    assert "KFUSE_HOME" in replace(found, disk_free=disk - 1).refusals[0]
    if stage == "evaluate":
        small = replace(found, memory_total=1)
        for dtype, told in (("float32", True), ("bfloat16", False)):
            refusals = [r for r in replace(small, dtype=dtype).refusals if r.startswith(stage)]
            assert refusals
            assert all(("evaluate.dtype: bfloat16" in r) == told for r in refusals)


def test_a_recipe_that_cannot_fit_is_exit_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT)
    monkeypatch.setattr(module, "rates_of", lambda *_: {})
    assert "What it will take" in foresee(str(path))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(RunError, match="cannot fit:\ndisk:"):
        foresee(str(path))


def test_a_budgeted_row_takes_what_the_other_and_its_sources_take(
    found: Forecast, tiny: dict[str, Path], home: Path
) -> None:
    text = TEXT.replace("  pack:", "  equal: {train: {init: llama, budget: fused}}\n  pack:")
    planned = plan(parse(text, "r"), home)
    build(planned, ["llama", "gemma"])
    planned = plan(planned.recipe, planned.home)
    steps = pending(planned, planned.recipe.rows, ("build",))
    again = forecast(planned, steps, "h100")
    parts = [work(found, "train", "fused").flops, work(found, "capture", "gemma").flops]
    assert work(again, "train", "equal").flops == sum(part or 0 for part in parts)
    assert [w.flops for w in again.work if w.name == "clm"] == [work(found, "train", "clm").flops]


def test_processes_on_a_cpu_share_one_memory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT + "machine: {device: cpu, processes: 4}\n"
    memory = []
    monkeypatch.setattr(module, "rates_of", lambda *_: {})
    for change in ("", "machine.processes=1"):
        planned = plan(parse(text, "r", [change] if change else []), home)
        build(planned, ["llama"])
        planned = plan(planned.recipe, planned.home)
        steps = [step for step in planned.builds() if step.name == "clm"]
        memory.append(forecast(planned, steps).work[0].memory)
    assert memory[0] == 4 * (memory[1] or 0) > 0


def test_adapters_have_gradients_and_moments_and_the_model_has_not(
    found: Forecast, tiny: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rates_of", lambda *_: {})
    lora = ["variants.clm.train.lora={rank: 2, targets: [up_proj]}"]
    planned = plan(parse(TEXT + "machine: {device: cpu}\n", "r", lora), home)
    (step,) = [step for step in planned.builds() if step.name == "clm"]
    absent = forecast(planned, [step], "h100").work[0]
    assert (absent.flops, absent.memory) == (None, None), "its matrices are not known"
    build(planned, ["llama"])
    here = forecast(planned, [step]).work[0]
    model = skeleton(tiny["llama"])
    weights, trained = sum(w.numel() for w in model.parameters()), 2 * 2 * (48 + 96)
    assert here.memory == 4 * weights + 16 * trained
    assert here.flops == training(size(model), [64] * 9 + [24], trained)
    # Two processes in bfloat16 with zero2: a copy each of all weights, and half of what is trained.
    zero2 = ["machine.processes=2", "machine.deepspeed=zero2", "variants.clm.train.dtype=bfloat16"]
    shared = plan(parse(TEXT, "r", [*lora, *zero2]), home)
    (step,) = [step for step in shared.builds() if step.name == "clm"]
    each = forecast(shared, [step], "h100").work[0]
    assert each.memory == 2 * weights + 2 * trained + 14 * trained // 2


def test_absent_models_are_counted_by_what_the_recipe_says(home: Path) -> None:
    """With a number of weights: 6·Ψ FLOPs a token, 16 Ψ bytes to train, 2 Ψ to fetch."""
    text = TEXT.replace('path: "tiny:llama"', "path: some/llama, parameters: 7e9")
    planned = plan(parse(text + "machine: {processes: 8}\n", "r"), home)
    steps = pending(planned, planned.recipe.rows, ("build", "evaluate"))
    found = forecast(planned, steps, "h100")
    clm = work(found, "train", "clm")
    assert (clm.flops, clm.memory, clm.disk) == (6 * 7 * 10**9 * 600, 16 * 7 * 10**9, 4 * 7 * 10**9)
    assert work(found, "fetch", "llama").disk == 2 * 7 * 10**9
    assert clm.seconds == pytest.approx((clm.flops or 0) / (0.4 * 9.89e14))
    said = sums(found)
    assert "GPU-hours on h100" in said
    assert "7.0 billion weights in 8 processes" in said
    gib = 7e9 / 2**30
    for how, a_weight in (("none", 16), ("zero2", 4 + 12 / 8), ("fsdp", 2)):
        assert f"{how} {a_weight * gib:.1f}" in said
    assert any("machine.deepspeed" in refusal for refusal in found.refusals)
    shared = plan(parse(text + "machine: {processes: 4, hosts: 2, deepspeed: zero3}\n", "r"), home)
    room = replace(forecast(shared, steps, "h100"), disk_free=10**12)
    assert room.refusals == []


def test_an_unknown_gpu_is_named(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT)
    with pytest.raises(RecipeError, match="a100, h100, h200"):
        foresee(str(path), gpu="h1")


def test_a_suite_without_an_average_has_a_line_for_each_task() -> None:
    alone = (("TriviaQA", 500, (0.028, 0.056)), ("IWSLT2017", 500, None))
    asked = Questions("generation@fusellm", 1000, 1000, None, {}, 50, alone=alone)
    text = table(Forecast((asked,), (), 10, 10, "cpu"))
    assert "no average: each task alone" in text
    assert "2.8 points / 5.6 points" in text
    assert "not known before it is measured" in text


def test_questions_that_cannot_be_had_are_named() -> None:
    lost = Questions("bbh@fusellm", 0, 0, None, {}, 0, "no network")
    text = table(Forecast((lost,), (), 10, 10, "cpu"))
    assert "no network" in text
    assert "unknown" in text


def test_a_busy_machine_is_told_beside_times_that_were_calibrated_on_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(parse(TEXT, "r", ["machine.device=cpu"]), home)
    steps = pending(planned, planned.recipe.rows, ("build", "evaluate"))
    monkeypatch.setattr(rates, "measure", lambda *_: rates.Rates(1e9, 1e9, 1e9))
    monkeypatch.setattr("psutil.cpu_percent", lambda _: 90.0)
    absent = sums(forecast(planned, steps))
    assert absent.startswith("in all: not known; 0.0 of ")
    assert "other work" not in absent
    build(planned, ["llama", "gemma"])
    planned = plan(planned.recipe, home)
    steps = pending(planned, planned.recipe.rows, ("build", "evaluate"))
    for busy, told in ((0.9, True), (0.2, False)):
        monkeypatch.setattr("psutil.cpu_percent", lambda _, busy=busy: 100 * busy)
        assert ("other work had 90% of this machine" in sums(forecast(planned, steps))) is told
    monkeypatch.setattr("psutil.cpu_percent", lambda _: 90.0)
    assert "other work" not in sums(forecast(planned, steps, "h100"))


def test_brackets_in_names_and_reasons_are_text() -> None:
    lost = Questions("lm_eval:[x]", 0, 0, None, {}, 0, "absent [/data/x] :smile:")
    work = Work("train", "fused[top_k=4]", None, None, None, 0, None)
    text = table(Forecast((lost,), (work,), 10, 10, "cpu"))
    for part in ("lm_eval:[x]", "absent [/data/x] :smile:", "fused[top_k=4]"):
        assert part in text


def test_brackets_in_names_are_text_in_what_would_be_done(home: Path) -> None:
    text = TEXT.replace("clm:", '"clm[bold]":').replace(": clm", ": clm[bold]")
    planned = plan(parse(text, "r"), home)
    said = overview(planned, planned.recipe.rows, ("build", "evaluate"))
    assert "clm[bold]" in said.partition("to build:")[0]


@pytest.mark.parametrize(("seconds", "said"), [(3, "3 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
