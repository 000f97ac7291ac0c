"""What is built and what is not: one row's failure leaves the others."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from fusion.corpus import read_blocks
from fusion.errors import RunError
from fusion.flops import size, training
from fusion.models import skeleton
from harness.build import STAGES, build, needed
from harness.plan import plan
from harness.recipe import parse
from harness.run import run
from harness.scoring import SharedPrefixLM
from harness.store import read_manifest

TEXT = """
sources:
  a: {path: "tiny:llama"}
  b: {path: "tiny:gemma"}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 640}
variants:
  refused: {merge: {inputs: [a, a], method: linear, parameters: {weights: [1, -1]}}}
  later: {merge: {inputs: [refused, a], method: linear}}
  mean: {merge: {inputs: [a, a], method: linear}}
evaluate: {suites: [tiny_text]}
reference: a
"""


def test_parameters_that_only_the_method_refuses_leave_the_other_rows(home: Path) -> None:
    planned = plan(parse(TEXT, "r"), home)
    reasons = build(planned, planned.recipe.rows)
    assert reasons.keys() == {"refused", "later"}
    assert reasons["later"] == reasons["refused"]
    assert reasons["refused"].startswith("merge refused failed: merge method linear: ")
    assert planned.steps[planned.identities["mean"]].done


def test_a_tokenizer_of_another_model_is_told_wherever_its_ids_would_be_read(
    home: Path, tmp_path: Path, tiny: dict[str, Path]
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny["llama"], mixed)
    for file in tiny["gemma"].glob("tokenizer*"):
        shutil.copy(file, mixed)
    text = f"""
sources: {{a: {{path: {mixed}}}, b: {{path: "tiny:llama"}}}}
corpus: {{path: "tiny:corpus", blocks: 64, tokens: 640}}
variants:
  clm: {{train: {{init: a}}}}
  fused: {{train: {{init: b, fuse: {{sources: [a], function: min_ce, clm_weight: 0.9}}}}}}
  online:
    {{train: {{init: b, fuse: {{sources: [a], function: avg_ce, clm_weight: 0.9, online: true}}}}}}
  fisher: {{merge: {{inputs: [a, a], method: fisher}}}}
evaluate: {{suites: [tiny_text]}}
reference: b
"""
    planned = plan(parse(text, "r"), home)
    reasons = build(planned, ["clm", "fused", "online", "fisher"])
    assert reasons["fisher"].startswith("statistics a")
    assert "train clm failed" in reasons["clm"]
    assert "capture a failed" in reasons["fused"]
    assert "train online failed" in reasons["online"]
    assert all("tokenizer of another model" in reason for reason in reasons.values())
    with pytest.raises(RunError, match="tokenizer of another model"):
        SharedPrefixLM(str(mixed), device="cpu")


def test_a_step_whose_lock_was_taken_away_leaves_the_folder_to_another(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(parse(TEXT, "r"), home)
    step = planned.steps[planned.identities["mean"]]
    lock = home / "running" / f"{step.folder.name}.lock"

    def slow(*_: object) -> dict:
        lock.write_text('{"token": "of another"}')
        return {}

    monkeypatch.setitem(STAGES, "merge", slow)  # type: ignore[arg-type]
    reasons = build(planned, ["mean"])
    assert "lost its lock to another process, which goes on with it" in reasons["mean"]
    assert not list(step.folder.iterdir())
    assert lock.exists()


BUDGET = """
sources: {a: {path: "tiny:llama"}, b: {path: "tiny:gemma"}}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 640}
variants:
  one: {train: {init: a}}
  two: {train: {init: b}}
  fused: {train: {init: a, fuse: {sources: [one, two], function: min_ce, clm_weight: 0.9}}}
  equal: {train: {init: a, budget: fused}}
  merged: {merge: {inputs: [one, a], method: fisher}}
  pack: {ensemble: {members: [one, two], rule: mean_probability}}
  again: {repeat: {row: merged}}
evaluate: {suites: [tiny_text]}
reference: a
"""


ADAPTED = """
sources: {a: {path: "tiny:llama"}}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 640}
variants:
  adapted: {train: {init: a, batch_blocks: 5, lora: {rank: 2, targets: TARGETS}}}
  mean: {merge: {inputs: [a, adapted], method: linear}}
evaluate: {suites: [tiny_text]}
reference: a
"""


def test_adapters_are_a_row_as_any_other(home: Path) -> None:
    pytest.importorskip("peft")
    planned = plan(parse(ADAPTED.replace("TARGETS", "[up_proj]"), "r"), home)
    assert build(planned, ["mean"]) == {}
    found = read_manifest(planned.steps[planned.identities["adapted"]].folder)
    assert found
    # Two layers of 48 to 96; 3 forward passes of adapters, 2 of all other weights.
    assert found["facts"]["trained_weights"] == 2 * 2 * (48 + 96)
    assert found["facts"]["peft"] == version("peft")
    folder = planned.folders["a"]
    assert folder
    corpus = planned.steps[found["content"]["corpus"]].folder
    lengths = [sum(len(p.ids) for p in b) for b in read_blocks(corpus / "blocks.parquet")]
    whole, part = (training(size(skeleton(folder)), lengths, n) for n in (None, 576))
    assert found["cost"]["flops"] == part < whole
    assert planned.summaries["adapted"].endswith("by adapters of rank 2")


def test_targets_that_name_nothing_are_told_by_row_and_before_training(home: Path) -> None:
    pytest.importorskip("peft")
    planned = plan(parse(ADAPTED.replace("TARGETS", "[c_attn]"), "r"), home)
    reasons = build(planned, ["mean"])
    assert "variants.adapted.train.lora.targets: 'c_attn' names no linear" in reasons["mean"]
    assert not (planned.steps[planned.identities["adapted"]].folder / "job.json").exists()


def test_without_peft_nothing_is_computed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(ADAPTED.replace("TARGETS", "all-linear"))
    monkeypatch.setattr("fusion.lora.find_spec", lambda _: None)
    with pytest.raises(RunError, match=r"pip install 'kfuse\[lora\]'"):
        run(str(path), stages=("build",))
    assert not list(home.iterdir())
    assert run(str(path), only=["a"], stages=("build",)) == 0
    planned = plan(parse(path.read_text(), "r"), home)
    assert "peft" in build(planned, ["adapted"])["adapted"]


def test_a_row_needs_what_its_steps_say_and_nothing_that_only_counts(home: Path) -> None:
    planned = plan(parse(BUDGET, "r"), home)

    def built(row: str) -> list[tuple[str, str]]:
        wanted = needed(planned, [row])
        return [(s.kind, s.name) for s in planned.builds() if s.identity in wanted]

    given = [("fetch", "a"), ("fetch", "b"), ("pack", "corpus")]
    assert built("equal") == [*given, ("train", "equal")]
    both = [("train", "one"), ("train", "two")]
    found = built("fused")
    assert {("capture", "one"), ("capture", "two"), ("map", "b-to-a"), *both} <= set(found)
    merged = [given[0], given[2], ("train", "one")]
    merged += [("statistics", "one"), ("statistics", "a"), ("merge", "merged")]
    assert built("merged") == built("again") == merged
    assert set(built("pack")) == {*given, *both, ("map", "b-to-a")}
