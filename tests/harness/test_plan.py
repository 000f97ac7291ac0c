"""Identities: what a change renames, and what it does not."""

from __future__ import annotations

import shutil
from cProfile import Profile
from pathlib import Path

import pytest

from fusion.errors import RunError
from harness.plan import Plan, plan
from harness.recipe import parse
from harness.report import _trained
from harness.steps import root
from harness.store import finish, identity

TEXT = """
sources:
  a: {path: "tiny:llama"}
  b: {path: "tiny:gemma"}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 640}
variants:
  clm: {train: {init: a}}
  fused: {train: {init: a, fuse: {sources: [a, b], function: min_ce, clm_weight: 0.9}}}
  merged: {merge: {inputs: [clm, fused], method: linear}}
  pack: {ensemble: {members: [a, b], rule: packllm_sim}}
evaluate: {suites: [tiny_text, tiny_choice]}
reference: clm
"""


def planned(home: Path, *overrides: str, text: str = TEXT) -> Plan:
    return plan(parse(text, "r", overrides), home)


def changed(home: Path, *overrides: str) -> set[str]:
    """Names of the rows whose model is another one after the overrides."""
    one, two = planned(home), planned(home, *overrides)
    return {row for row in one.identities if one.identities[row] != two.identities[row]}


def test_lambda_rebuilds_the_fused_row_and_what_depends_on_it(home: Path) -> None:
    assert changed(home, "variants.fused.train.fuse.clm_weight=0.8") == {"fused", "merged"}
    one = set(planned(home).steps)
    two = set(planned(home, "variants.fused.train.fuse.clm_weight=0.8").steps)
    kinds = {planned(home).steps[key].kind for key in one - two}
    assert kinds == {"train", "merge", "evaluate"}  # no capture, no packing


def test_operation_rebuilds_nothing(home: Path) -> None:
    operations = ["machine.micro_batch=4", "machine.device=cpu", "machine.batch_tokens=99"]
    operations += ["machine.processes=2", "machine.gradient_checkpointing=true"]
    assert set(planned(home).steps) == set(planned(home, *operations).steps)


def test_what_is_measured_does_not_rename_models(home: Path) -> None:
    assert not changed(home, "evaluate.limit=2", "evaluate.dtype=bfloat16")
    one, two = planned(home), planned(home, "evaluate.limit=2")
    assert not {s.identity for s in one.evaluations("a")} & {
        s.identity for s in two.evaluations("a")
    }


@pytest.mark.parametrize(
    ("override", "rows"),
    [
        ("variants.clm.train.learning_rate=0.5", {"clm", "merged"}),
        ("variants.fused.train.fuse.top_k=4", {"fused", "merged"}),
        ("variants.clm.train.lora={}", {"clm", "merged"}),
        ("corpus.tokens=1280", {"clm", "fused", "merged"}),
        ("seed=18", {"clm", "fused", "merged"}),
        ("variants.clm.train.seed=18", {"clm", "merged"}),
        ("variants.clm.train.seed=17", set()),  # the recipe's own
        ("variants.pack.ensemble.rule=top1", {"pack"}),
        ("variants.pack.ensemble.level=sequence", {"pack"}),
        ("variants.pack.ensemble.weights=[0.5,0.5]", {"pack"}),
    ],
)
def test_what_each_field_renames(home: Path, override: str, rows: set[str]) -> None:
    assert changed(home, override) == rows


def test_seeds_of_one_training_belong_together_and_have_orders_of_their_own(home: Path) -> None:
    seeds = "clm: {matrix: {train.seed: [17, 18, 19]}, train: {init: a}}"
    text = TEXT.replace("clm: {train: {init: a}}", seeds).replace("[clm, fused]", "[fused]")
    found = planned(home, "reference=a", text=text)
    rows = [row for row in found.recipe.rows if row.startswith("clm")]
    contents = [found.steps[found.identities[row]].content for row in rows]
    assert [content.get("order") for content in contents] == [None, "drawn", "drawn"]
    assert len({_trained(found, row) for row in rows}) == 1


def test_adapters_name_a_row_and_no_adapters_name_nothing(home: Path) -> None:
    def content(*overrides: str) -> dict:
        found = planned(home, *overrides)
        return found.steps[found.identities["clm"]].content

    assert "lora" not in content(), "rows of earlier versions keep their names"
    assert content("variants.clm.train.lora={}")["lora"]["rank"] == 8
    names = {
        planned(home, f"variants.clm.train.lora={given}").identities["clm"]
        for given in ("{}", "{alpha: 16}", "{rank: 4}", "{targets: [q_proj]}", "{dropout: 0.1}")
    }
    assert len(names) == 4, "what is written out and is the default is no other row"
    text = TEXT.replace("  merged:", "  equal: {train: {init: a, budget: fused}}\n  merged:")
    one, two = (
        planned(home, *given, text=text).identities["equal"]
        for given in ((), ("variants.fused.train.lora={}",))
    )
    assert one != two, "fewer FLOPs are another budget"


def test_a_budget_is_what_it_counts_and_not_whose_it_is(home: Path) -> None:
    text = TEXT.replace(
        "  merged:",
        "  equal: {train: {init: a, budget: fused}}\n  one: {train: {init: a}}\n  merged:",
    )
    before = planned(home, text=text).identities
    assert before["equal"] != before["one"] == before["clm"]
    cheap = "variants.fused.train.fuse.clm_weight=0.8"
    assert planned(home, cheap, text=text).identities["equal"] == before["equal"]
    for dear in ("variants.fused.train.fuse.sources=[a]", "variants.fused.train.epochs=2"):
        assert planned(home, dear, text=text).identities["equal"] != before["equal"]


def test_domains_are_another_corpus_and_their_order_is_not(home: Path) -> None:
    given = "variants.clm.train.domains="
    assert changed(home, given + "[town]") == {"clm", "merged"}
    one, two = (planned(home, given + d).identities["clm"] for d in ("[a, b]", "[b, a]"))
    assert one == two


@pytest.mark.parametrize(
    ("more", "own"),
    [({}, False), ({"dtype": "float32"}, False), ({"tokenizer": {"source": "union"}}, True)]
    + [({"tokenizer_source": "b"}, True), ({"modules": {}}, True)],
)
def test_a_merge_with_a_tokenizer_or_layers_of_its_own_is_what_follows_packs_by(
    home: Path, more: dict, own: bool
) -> None:
    given = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]} | more
    merge = f"variants.merged.merge={{mergekit: {given}}}"
    text = TEXT.replace("  pack:", "  later: {train: {init: merged}}\n  pack:")
    found = planned(home, merge, "variants.pack.ensemble.members=[a, merged]", text=text)
    carries = "merged" if own else "a"
    assert {row: root(found.recipe, row) for row in ("clm", "merged", "later")} == {
        "clm": "a",
        "merged": carries,
        "later": carries,
    }
    packs = {step.content["row"]: step for step in found.builds() if step.kind == "pack"}
    assert "later" in packs[carries].rows
    assert packs[carries].content["tokenizer"] == found.identities[carries]
    (mapped,) = [s for s in found.builds() if s.kind == "map" and "pack" in s.rows]
    assert (mapped.content["source_row"], mapped.content["target_row"]) == (carries, "a")
    assert found.identities[carries] in mapped.needs


def test_key_order_does_not_matter() -> None:
    assert identity({"a": 1, "b": [1, 2]}) == identity({"b": [1, 2], "a": 1})
    assert identity({"a": 1}) != identity({"a": 2})


def test_one_byte_of_a_weight_changes_the_model(tiny: dict[str, Path], tmp_path: Path) -> None:
    local = tmp_path / "model"
    shutil.copytree(tiny["llama"], local)
    text = TEXT.replace("tiny:llama", str(local))
    before = planned(tmp_path, text=text).identities
    assert planned(tmp_path, text=text).identities == before
    weights = local / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    after = planned(tmp_path, text=text).identities
    assert {row for row in before if before[row] != after[row]} == {
        "a",
        "clm",
        "fused",
        "merged",
        "pack",
    }


def test_recipes_share_what_is_equal_under_any_name(home: Path) -> None:
    one = planned(home)
    folder = one.folders["clm"]
    assert folder is not None
    folder.mkdir(parents=True)
    finish(folder, {})
    text = TEXT.replace("clm:", "baseline:").replace("[clm,", "[baseline,")
    text = text.replace("reference: clm", "reference: baseline")
    assert planned(home, text=text).folders["baseline"] == folder


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "model.gguf", "a/b/c"])
def test_a_missing_model_says_what_is_possible(home: Path, path: str) -> None:
    with pytest.raises(RunError, match=r"sources\.a\.path: .*does not exist \(/"):
        planned(home, text=TEXT.replace("tiny:llama", path))


def test_a_file_below_the_home_folder_is_found(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    text = TEXT.replace("tiny:llama", "~/m.gguf")
    assert (
        planned(home, text=text).identities
        == planned(home, text=TEXT.replace("tiny:llama", str(tmp_path / "m.gguf"))).identities
    )


def test_planning_grows_no_faster_than_rows(home: Path) -> None:
    planned(home)  # reads modules
    calls = []
    for rows in (25, 50, 100):
        weights = [round(0.001 * i, 3) for i in range(rows)]
        text = TEXT.replace(
            "clm_weight: 0.9}}}",
            f"clm_weight: 0.9}}}}, matrix: {{train.fuse.clm_weight: {weights}}}}}",
        ).replace("[clm, fused]", "[clm]")
        with Profile() as profile:
            assert len(planned(home, text=text).identities) == rows + 5
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    assert calls[2] - calls[1] < 2.2 * (calls[1] - calls[0])
