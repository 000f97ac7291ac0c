"""mergekit as a program: configurations, what it leaves, what goes wrong. A fake one stands in."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fusion.checkpoints import merge as merge_folders
from fusion.errors import RecipeError, RunError
from fusion.mergekit import VARIABLE, _run, configuration, made_by, merge, references, version

REAL = os.environ.get(VARIABLE, "")
# Takes the mean of the models in its configuration; what it does wrong is in its folder.
FAKE = """#!{python}
import json, shutil, sys
from pathlib import Path
import yaml
from safetensors.torch import load_file, save_file
given, out = yaml.safe_load(open(sys.argv[1])), Path(sys.argv[2])
wrong = Path(sys.argv[0]).with_name("wrong").read_text()
(Path(sys.argv[0]).with_name("called")).write_text(json.dumps([given, sys.argv[3:]]))
if wrong == "fails":
    sys.exit("no such method")
folders = [Path(m["model"]) for m in given["models"]]
parts = [load_file(f / "model.safetensors") for f in folders]
mean = {{n: sum(p[n] for p in parts) / len(parts) for n in parts[0]}}
if wrong == "lost":
    mean.pop("model.layers.0.mlp.up_proj.weight")
if wrong == "shape":
    mean["model.norm.weight"] = mean["model.norm.weight"][:-1].clone()
if wrong != "empty":
    shutil.copy(folders[0] / "config.json", out / "config.json")
    save_file(mean, out / "model.safetensors", metadata={{"format": "pt"}})
"""


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for seed, name in enumerate(("zero", "one", "two")):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        config = LlamaConfig(**sizes, num_attention_heads=2, vocab_size=8)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        found[name] = tmp_path / name
    return found


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin" / "mergekit-yaml"
    path.parent.mkdir()
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    path.with_name("wrong").write_text("")
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def told(method: str, inputs: list[str], base: str | None = None) -> dict[str, Any]:
    return {"inputs": inputs, "base": base, "method": method, "parameters": {}}


def test_a_method_becomes_a_configuration() -> None:
    parameters = {"normalize": True, "seed": 3, "models": [{"weight": 1.0}, {"weight": [0, 1]}]}
    found = configuration("mergekit:della", parameters, ["one", "two"], "zero", "bfloat16")
    assert found == {
        "merge_method": "della",
        "models": [
            {"model": "one", "parameters": {"weight": 1.0}},
            {"model": "two", "parameters": {"weight": [0, 1]}},
        ],
        "base_model": "zero",
        "parameters": {"normalize": True},
        "dtype": "bfloat16",
    }
    assert references(found) == ["one", "two", "zero"]
    sliced = {"slices": [{"sources": [{"model": m, "layer_range": [0, 1]}]} for m in "aba"]}
    assert references(sliced) == ["a", "b"]
    with pytest.raises(RecipeError, match="1 models' parameters for 2 inputs"):
        configuration("mergekit:ties", {"models": [{}]}, ["one", "two"], None, "float32")
    with pytest.raises(RecipeError, match="list of mappings"):
        configuration("mergekit:ties", {"models": [1, 2]}, ["one", "two"], None, "float32")


def test_what_comes_out_is_a_whole_folder(
    models: dict[str, Path], fake: Path, tmp_path: Path
) -> None:
    given = configuration("mergekit:linear", {"weight": 1.0}, ["one", "two"], None, "float32")
    section = told("mergekit:linear", ["one", "two"])
    facts = merge(given, {n: models[n] for n in ("one", "two")}, tmp_path / "out", section, seed=5)
    out = tmp_path / "out"
    config, flags = yaml.safe_load((fake.with_name("called")).read_text())
    assert [m["model"] for m in config["models"]] == [str(models["one"]), str(models["two"])]
    assert flags[:2] == ["--random-seed", "5"]
    merge_folders([models["one"], models["two"]], None, tmp_path / "ours", "linear", {})
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, ours[name], atol=3e-7, rtol=0)
    _, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    assert (out / "tokenizer.json").exists()
    assert yaml.safe_load((out / "mergekit.yaml").read_text()) == given  # rows, no folders
    assert yaml.safe_load((out / "merge.yaml").read_text())["merge"]["inputs"] == ["one", "two"]
    assert "mergekit:linear merge of one, two" in (out / "README.md").read_text()
    assert facts["tensors"] == len(ours)
    assert facts["parameters"] == sum(t.numel() for t in ours.values())


WRONG = [
    ("fails", r"mergekit ended with 1; it said:\n.*no such method"),
    ("lost", "does not load: it lacks model.layers.0.mlp.up_proj.weight"),
    ("shape", r"does not load: it has model.norm.weight of shape \(15,\)"),
    ("empty", "left no config.json"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_what_goes_wrong_leaves_nothing(
    models: dict[str, Path], fake: Path, tmp_path: Path, wrong: str, message: str
) -> None:
    fake.with_name("wrong").write_text(wrong)
    given = configuration("mergekit:linear", {}, list(models), None, "float32")
    with pytest.raises(RunError, match=message):
        merge(given, models, tmp_path / "out", told("mergekit:linear", list(models)))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_models_that_do_not_fit_never_reach_it(
    models: dict[str, Path], fake: Path, tmp_path: Path
) -> None:
    path = models["two"] / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": torch.zeros(9, 16)}, path, metadata={"format": "pt"})
    given = configuration("mergekit:linear", {}, ["one", "two"], None, "float32")
    pair = {name: models[name] for name in ("one", "two")}
    with pytest.raises(RunError, match=r"lm_head.weight is \(8, 16\) in one but \(9, 16\) in two"):
        merge(given, pair, tmp_path / "out", told("mergekit:linear", list(pair)))
    assert not fake.with_name("called").exists()


def test_absent_is_said_with_what_to_do(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing"))
    given = configuration("mergekit:linear", {}, list(models), None, "float32")
    with pytest.raises(RunError, match=r"which is no file: install kfuse\[mergekit\], or set"):
        merge(given, models, tmp_path / "out", told("mergekit:linear", list(models)))
    assert version() == "absent"


def test_the_identity_has_mergekits_version(fake: Path) -> None:
    assert made_by("linear") == {}
    before = made_by("mergekit:linear")["mergekit_version"]
    fake.write_text(fake.read_text() + "\n# another\n")
    assert before not in ("absent", made_by("mergekit:linear")["mergekit_version"])


def test_a_program_whose_interpreter_is_gone_is_named_by_its_content(fake: Path) -> None:
    for first in ("#!/gone/bin/python", "#! /gone/bin/python -s"):
        fake.write_text(f"{first}\n")
        assert version().startswith("program-")
    with pytest.raises(RunError, match="cannot be run"):
        _run(fake, fake, fake.parent / "out", 0, own=False)


@pytest.mark.skipif(not REAL, reason=f"{VARIABLE} names no mergekit-yaml")
@pytest.mark.parametrize(("method", "ours", "parameters", "options"), [
    ("mergekit:ties", "ties@mergekit", {"weight": 1.0, "density": 0.5}, {"density": 0.5}),
    ("mergekit:sce", "sce@mergekit", {"select_topk": 0.5}, {"select_topk": 0.5}),
    ("mergekit:nearswap", None, {"t": 0.01}, {}),
])  # fmt: skip
def test_the_real_one(
    models: dict[str, Path], tmp_path: Path, method: str, ours: str | None, parameters: dict,
    options: dict,
) -> None:  # fmt: skip
    inputs = ["one", "two"] if ours else ["one"]
    given = configuration(method, parameters, inputs, "zero", "float32")
    out = tmp_path / "out"
    folders = {name: models[name] for name in (*inputs, "zero")}
    facts = merge(given, folders, out, told(method, inputs, "zero"))
    assert facts["mergekit"].count(".") == 2
    AutoModelForCausalLM.from_pretrained(out)
    if ours:
        pair = [models[name] for name in inputs]
        merge_folders(pair, models["zero"], tmp_path / "ours", ours, options)
        expected = load_file(tmp_path / "ours" / "model.safetensors")
        for name, tensor in load_file(out / "model.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], atol=3e-7, rtol=0)
