"""Strict recipes: every mistake at once, with its path, what is allowed and a close match."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from fusion.errors import RecipeError
from fusion.functions import FUSION_FUNCTIONS
from harness.recipe import BUNDLED, _Loader, bundled, load, parse, schema

GOOD = """
sources:
  a: {path: "tiny:llama"}
  b: {path: "tiny:gemma"}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 640}
variants:
  clm: {train: {init: a, learning_rate: 1e-4}}
  fused: {train: {init: a, fuse: {sources: [a, b], function: min_ce, clm_weight: 0.9}}}
  merged: {merge: {inputs: [clm, fused], method: linear, parameters: {weights: [1, 2]}}}
  pack: {ensemble: {members: [a, b], rule: packllm_sim}}
evaluate: {suites: [tiny_text, tiny_choice], limit: {tiny_text: 3}}
reference: clm
"""


def problems(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    return str(caught.value)


def test_a_good_recipe_reads() -> None:
    recipe = parse(GOOD, "r.yaml")
    assert recipe.rows == ["a", "b", "clm", "fused", "merged", "pack"]
    assert recipe.variants["clm"].train is not None
    assert recipe.variants["clm"].train.learning_rate == 1e-4
    assert recipe.limit("tiny_text") == 3
    assert recipe.limit("tiny_choice") is None


@pytest.mark.parametrize("name", bundled())
def test_bundled_recipes_read(name: str) -> None:
    assert load(name).recipe.rows


def test_all_mistakes_come_in_one_message() -> None:
    wrong = (
        GOOD.replace("min_ce", "mince")
        .replace("members: [a, b]", "members: [a, bb]")
        .replace("method: linear", "method: lineer")
        .replace("tiny_choice]", "tiny_choise]")
        .replace("reference: clm", "reference: cml")
        .replace("tokens: 640", "tokens: many")
        .replace("rule: packllm_sim", "rule: packlm")
        .replace("learning_rate", "lerning_rate")
    )
    message = problems(wrong)
    assert "r.yaml: 8 problems" in message
    for part in (
        "variants.fused.train.fuse.function",
        f"'mince' is unknown; known: {', '.join(FUSION_FUNCTIONS)} (min_ce?)",
        "variants.pack.ensemble.members[1]",
        "'bb' is no row here",
        "'lineer' is unknown",
        "(linear?)",
        "tiny_choise",
        "(tiny_choice?)",
        "'cml' is no row here",
        "(clm?)",
        "corpus.tokens",
        "'many'",
        "packllm_sim",
        "lerning_rate",
        "(learning_rate?)",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("reference: clm", "", "reference"),
        ("limit: {tiny_text: 3}", "limit: 0", "at least 1"),
        ("limit: {tiny_text: 3}", "limit: {bbh81: 3}", "not among evaluate.suites"),
        ("limit: {tiny_text: 3}", "limit: true", "evaluate.limit"),
        ("clm_weight: 0.9", "clm_weight: 1.5", "variants.fused.train.fuse.clm_weight"),
        ("clm_weight: 0.9", 'clm_weight: "0.9"', "number"),
        (", clm_weight: 0.9", "", "clm_weight"),
        ("clm_weight: 0.9", "clm_weight: {start: 0.9}", "clm_weight.end"),
        ("clm_weight: 0.9", "clm_weight: {start: 0.9, edn: 1}", "(end?)"),
        ("clm_weight: 0.9", "clm_weight: 0.9, objective: kll", "(kl?)"),
        ("clm_weight: 0.9", "clm_weight: 0.9, unaligned: none", "'one_hot@reference'"),
        ("min_ce", "avg_entropy, objective: alm", "only min_ce or avg_ce"),
        ("min_ce", "min_ce@reference, level: span", "block or document"),
        ("function: min_ce", "fidelity: reference, parameters: {bfloat61: false}", "(bfloat16?)"),
        ("function: min_ce", "fidelity: referense", "'reference'"),
        ("weights: [1, 2]", "wieghts: [1, 2]", "(weights?)"),
        ("weights: [1, 2]", "weights: [1]", "merge.parameters.weights  1 for 2 inputs"),
        ("linear, parameters: {weights: [1, 2]", "fisher, parameters: {floor: 0", "greater than 0"),
        (
            "linear, parameters: {weights: [1, 2]",
            "'mergekit:linear', parameters: {seed: x",
            "merge.parameters.seed  'x' is not right; should be a whole number",
        ),
        ("method: linear", "method: varm", "works on changes against a base"),
        ("train: {init: a, learning_rate: 1e-4}", "train: {init: clm}", "needs itself"),
        ("inputs: [clm, fused]", "inputs: [clm, pack]", "no weights to build on"),
        ("pack: {ensemble", "a: {ensemble", "a source has this name"),
        ("clm: {train: {init: a, learning_rate: 1e-4}}", "clm: {}", "exactly one of"),
        ("corpus: {", "korpus: {", "(corpus?)"),
        ("tiny:corpus", "tiny:corpse", "known: tiny:corpus, tiny:conversations (tiny:corpus?)"),
        ("suites: [tiny_text, tiny_choice]", "suites: [bbh, tiny_text]", "bbh81"),
        ("variants:\n", "variants:\n  clm: {train: {init: a}}\n", "stands twice"),
        ("packllm_sim", "packllm_sim, weights: [0.5, 0.6]", "sum to 1.1; they should sum to 1"),
        ("packllm_sim", "packllm_sim, weights: [-1, 2]", "from 0 on"),
        ("packllm_sim", "packllm_sim, weights: [.nan, 1]", "nan, 1: each should be"),
        ("packllm_sim", "packllm_sim, parameters: {temperature: 0}", "should be above 0"),
        ("packllm_sim", "mean_logit, level: chunk", "does not go with mean_logit"),
        ("sources:", "sources: [", "not valid YAML"),
        (
            "variants:\n",
            "machine: {device: gpu}\nvariants:\n",
            "should be auto, cpu, cuda or cuda:N",
        ),
        (
            "suites: [tiny_text, tiny_choice]",
            "suites: []",
            "is empty; should have at least 1 item",
        ),
        ("suites: [tiny_text, tiny_choice]", "suites: [tiny_text, tiny_text]", "is named twice"),
        ("linear, parameters: {weights: [1, 2]", "ties, parameters: {x: 1", "(ties@paper or"),
        ("function: min_ce", "function: avg_ce, parameters: {temperature: true}", "a number"),
        ("function: min_ce", "fidelity: reference, parameters: {bfloat16: 3}", "true or false"),
    ],
)
def test_one_mistake(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    assert expected in problems(GOOD.replace(old, new))


def test_one_word_says_all_that_the_published_code_does() -> None:
    text = GOOD.replace("function: min_ce", "fidelity: reference, unaligned: mask")
    fuse = parse(text, "r").variants["fused"].train.fuse  # type: ignore[union-attr]
    assert fuse
    assert fuse.function == "min_ce@reference"
    assert (fuse.alignment, fuse.vocabulary) == ("dtw", "min_ed@reference")
    assert (fuse.collision, fuse.tail) == ("first@reference", "renormalise@reference")
    assert fuse.top_k == 10
    assert fuse.unaligned == "mask"  # what is written stands
    assert "fidelity" not in fuse.results()


def test_overrides_go_through_the_same_door() -> None:
    recipe = parse(GOOD, "r", ["variants.fused.train.fuse.clm_weight=0.8", "evaluate.limit=4"])
    assert recipe.variants["fused"].train.fuse.clm_weight == 0.8  # type: ignore[union-attr]
    assert recipe.limit("tiny_choice") == 4
    for override, expected in (
        ("variants.fused.train.fuse.clm_wieght=0.8", "(clm_weight?)"),
        ("variants.fusd.train.init=a", "variants.fusd"),
        ("nonsense", "key=value"),
        ("variants.fused.train.fuse.sources.1=c", "'c' is no row here"),
        ("variants.fused.train.fuse.sources=[a, b, a]", "sources[2]"),
        ("variants.fused.train.fuse.sources=[a, b, a]", "'a' is named twice"),
    ):
        with pytest.raises(RecipeError) as caught:
            parse(GOOD, "r", [override])
        assert expected in str(caught.value), override


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("sources:\n", "sources:\n  1: {path: x}\n", "sources.1"),
        (
            "sources:\n",
            "sources:\n  yes: {path: x}\n",
            "reads this name as True (bool); put it in quotes",
        ),
        ("sources:\n", "sources:\n  c: {path: tiny:lama}\n", "(tiny:llama?)"),
        (
            "linear, parameters: {",
            "'mergekit:linear', parameters: {1: 2, ",
            "this key as 1 (int); put",
        ),
        ("{tiny_text: 3}", "{tiny_text: x}", "limit.tiny_text"),
        ("weights: [1, 2]", "1: 2", "'linear' has no such parameter"),
    ],
)
def test_keys_that_are_no_words_are_told_with_the_rest(old: str, new: str, expected: str) -> None:
    message = problems(GOOD.replace(old, new).replace("reference: clm", "reference: cml"))
    assert expected in message
    assert "'cml' is no row here" in message


def test_a_matrix_expands_to_named_rows() -> None:
    text = GOOD.replace(
        "clm_weight: 0.9}}}",
        "clm_weight: 0.9}}, matrix: {train.fuse.clm_weight: [0.5, 0.9], train.seed: [1, 2]}}",
    ).replace("[clm, fused]", '[clm, "fused[clm_weight=0.5,seed=1]"]')
    rows = parse(text, "r").rows
    assert [r for r in rows if r.startswith("fused")] == [
        f"fused[clm_weight={w},seed={s}]" for w in (0.5, 0.9) for s in (1, 2)
    ]


def test_a_matrix_names_rows_by_what_lists_and_mappings_hold() -> None:
    text = GOOD.replace(
        "clm_weight: 0.9}}}",
        "clm_weight: 0.9}}, matrix: {train.fuse.clm_weight: [{start: 0.7, end: 1.0}, 0.9]}}",
    ).replace("[clm, fused]", '[clm, "fused[clm_weight=0.7+1.0]"]')
    assert "fused[clm_weight=0.7+1.0]" in parse(text, "r").rows


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ("{train.fuse.clm_weight: []}", "at least one"),
        ("{}", "at least one"),
        ("{3: [0.5]}", "a key path"),
        (
            "{train.fuse.clm_weight: [{start: 0.7, end: 1.0}, {end: 0.7, start: 1.0}]}",
            "unlike values would both be the row fused[clm_weight=0.7+1.0]",
        ),
    ],
)
def test_a_matrix_that_would_lose_rows_is_refused(matrix: str, expected: str) -> None:
    assert expected in problems(GOOD.replace("0.9}}}", f"0.9}}}}, matrix: {matrix}}}"))


@pytest.mark.parametrize("sources", ["[other]", "[{init}]", "[other, {init}]"])
def test_dual_min_ce_wants_the_target_first_and_another(sources: str) -> None:
    raw = yaml.load(GOOD, _Loader)
    fuse = raw["variants"]["fused"]["train"]
    init = fuse["init"]
    other = next(name for name in raw["sources"] if name != init)
    fuse["fuse"] |= {"function": "dual_min_ce"}
    given = sources.replace("other", other).replace("{init}", init)
    fuse["fuse"]["sources"] = yaml.safe_load(given)
    assert f"name the row of init first, then at least one other: [{init}," in problems(
        yaml.safe_dump(raw)
    )
    fuse["fuse"]["sources"] = [init, other]
    parse(yaml.safe_dump(raw), "r")


def test_a_missing_file_lists_the_bundled_recipes() -> None:
    with pytest.raises(RecipeError, match=r"bundled: .*tiny.*\(tiny\?\)"):
        load("tinny")


def test_the_schema_accepts_what_the_code_accepts_and_is_the_published_one() -> None:
    made = schema()
    for name in bundled():
        jsonschema.validate(yaml.load((BUNDLED / f"{name}.yaml").read_text(), _Loader), made)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"sources": {}, "nonsense": 1}, made)
    published = json.loads((BUNDLED / "schema.json").read_text())
    assert published == json.loads(json.dumps(made)), (
        "run: kfuse schema > harness/recipes/schema.json"
    )


def test_a_text_that_is_no_mapping(tmp_path: Path) -> None:
    assert "mapping" in problems("- a\n- b\n")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        load(str(tmp_path / "x.yaml"))


EQUAL = GOOD.replace("  merged:", "  equal: {train: {init: a, budget: fused}}\n  merged:")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("budget: fused", "budget: fuse", r"variants\.equal\.train\.budget +'fuse' is no row"),
        ("budget: fused", "budget: merged", "'merged' is not trained: it has no FLOPs"),
        ("budget: fused", "budget: a", "'a' is not trained: it has no FLOPs"),
        ("budget: fused", "budget: equal", "variants.equal +needs itself"),
        ("budget: fused", "budget: fused, epochs: 2", "epochs +the budget decides"),
        ("init: a, fuse:", "init: a, budget: clm, fuse:", "only plain training takes a budget"),
        ("init: a, fuse:", "init: a, budget: clm, fuse:", "'fused' has a budget itself"),
        ("budget: fused", "domains: []", "at least 1 item"),
    ],
)
def test_a_budget_names_another_trained_row(old: str, new: str, expected: str) -> None:
    assert parse(EQUAL, "r.yaml").variants["equal"].train
    assert old in EQUAL
    assert re.search(expected, problems(EQUAL.replace(old, new)))


ADAPTED = GOOD.replace("1e-4}", "1e-4, lora: {rank: 4, alpha: 8, targets: [q_proj]}}")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("rank: 4", "rnak: 4", r"clm\.train\.lora\.rnak +unknown key; .*targets \(rank\?\)"),
        ("rank: 4", "rank: 0", r"clm\.train\.lora\.rank +0 is not right; .*than or equal to 1"),
        ("rank: 4", "rank: 4.5", r"lora\.rank +4\.5 is not right; should be a valid integer"),
        ("alpha: 8", "alpha: 0", r"lora\.alpha +0.* greater than 0"),
        ("alpha: 8", "dropout: 1", r"lora\.dropout +1.* less than 1"),
        ("[q_proj]", "[]", r"lora\.targets +.* at least 1 item"),
        ("[q_proj]", "[1]", r"lora\.targets\.0 +1 is not right; should be a valid string"),
        ("[q_proj]", "q_proj", r"lora\.targets +'q_proj' is not right; should be all-linear, or a"),
        ("{rank: 4, alpha: 8, targets: [q_proj]}", "true", r"lora +True is not right"),
    ],
)
def test_adapters_are_read_as_strictly_as_all_else(old: str, new: str, expected: str) -> None:
    train = parse(ADAPTED, "r.yaml").variants["clm"].train
    assert train
    assert train.lora
    assert train.lora.results() == {
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "targets": ["q_proj"],
    }
    assert old in ADAPTED
    assert re.search(expected, problems(ADAPTED.replace(old, new)))


def test_adapters_train_in_whole_copies_of_a_model(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    for machine, how in (
        ("{processes: 2, fsdp: true}", "fsdp"),
        ("{deepspeed: zero3}", "zero3"),
        ("{deepspeed: zero3_offload}", "zero3_offload"),
        (f"{{deepspeed: {file}}}", "zero3"),
    ):
        parse(f"{GOOD}machine: {machine}\n", "r.yaml")
        said = problems(f"{ADAPTED}machine: {machine}\n")
        assert re.search(rf"variants\.clm\.train\.lora +not with {how}, .*deepspeed: zero2", said)
    parse(f"{ADAPTED}machine: {{processes: 2, deepspeed: zero2}}\n", "r.yaml")
    file.write_text("[1]")  # no DeepSpeed file: for whoever reads it to say
    parse(f"{ADAPTED}machine: {{deepspeed: {file}}}\n", "r.yaml")


def test_a_mergekit_file_says_inputs_base_and_method(tmp_path: Path) -> None:
    file = tmp_path / "ties.yml"
    models = [{"model": row, "parameters": {"weight": 1.0}} for row in ("clm", "fused")]
    content = {"merge_method": "ties", "base_model": "a", "models": models, "dtype": "float32"}
    file.write_text(yaml.safe_dump(content))
    text = GOOD
    recipe = parse(text, "r.yaml", [f"variants.merged.merge={{mergekit: {file}}}"])
    merge = recipe.variants["merged"].merge
    assert merge
    assert (merge.inputs, merge.base, merge.method) == (["clm", "fused"], "a", "mergekit:ties")
    assert merge.mergekit == content
    jsonschema.validate({"variants": {"m": {"merge": {"mergekit": "x.yml"}}}}, schema() | {
        "required": []})  # fmt: skip
    # Its models are rows; a key that the file says, or none in it, is a mistake.
    file.write_text(yaml.safe_dump(content | {"base_model": "org/model"}))
    wrong = [f"variants.merged.merge={{mergekit: {file}, method: linear, parameters: {{t: 1}}}}"]
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml", wrong)
    assert "'org/model' is no row here" in str(caught.value)
    assert "merge.method  " in str(caught.value)
    assert "whose configuration says it" in str(caught.value)
    assert "merge.parameters.t" in str(caught.value)
    for damage in ("merge_method: [", "- a", "", "merge_method: ties"):
        file.write_text(damage)
        with pytest.raises(RecipeError, match=r"variants\.merged\.merge\.mergekit"):
            parse(text, "r.yaml", [f"variants.merged.merge={{mergekit: {file}}}"])
    with pytest.raises(RecipeError, match="absent.yml: cannot be read"):
        parse(text, "r.yaml", ["variants.merged.merge={mergekit: absent.yml}"])


def test_parameters_of_a_mergekit_method_are_its_own() -> None:
    merge = "{inputs: [a, b], base: a, method: 'mergekit:della', parameters: {epsilon: 0.1}}"
    assert parse(GOOD, "r.yaml", [f"variants.merged.merge={merge}"]).variants["merged"].merge
    padded = merge.replace("parameters: {", "pad: trim, parameters: {models: [{}], ")
    with pytest.raises(RecipeError) as caught:
        parse(GOOD, "r.yaml", [f"variants.merged.merge={padded}"])
    assert "its configuration has a tokenizer section" in str(caught.value)
    assert "one for each of the inputs" in str(caught.value)


@pytest.mark.parametrize(
    "variant",
    [
        "hello",
        "[1]",
        "{merge: {mergekit: {merge_method: linear, models: [{model: a}]}, parameters: 5}}",
        "{merge: {inputs: [a], method: [fisher]}}",
        "{ensemble: {members: [a, b], rule: [x]}}",
        "{ensemble: {members: [a,b,a], rule: mean_probability, level: token, weights: [0,.5,.5]}}",
    ],
)
def test_wrong_shapes_are_named_and_no_traceback(variant: str) -> None:
    text = GOOD.replace("  merged:", f"  wrong: {variant}\n  merged:")
    assert "variants.wrong" in problems(text)
