"""Merge methods: laws over the dictionary, recorded results, and whole checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fusion.checkpoints import merge
from fusion.errors import RecipeError, RunError
from fusion.merging import MERGE_METHODS, linear, needs_base, slerp, task_arithmetic, varm

ALL = pytest.mark.parametrize("method", MERGE_METHODS)


def tensors(seed: int, count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=g) for _ in range(count)]


@ALL
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_copies_merge_to_the_copy_and_bases_to_the_base(method: str, seed: int) -> None:
    base, model = tensors(seed, 2)
    weights = {"weights": [0.5, 0.5]} if method == "task_arithmetic" else {}
    found = MERGE_METHODS[method]([model, model.clone()], base, **weights)
    torch.testing.assert_close(found, model, atol=1e-6, rtol=1e-5)
    found = MERGE_METHODS[method]([base.clone(), base.clone()], base)
    torch.testing.assert_close(found, base, atol=1e-6, rtol=1e-5)


@ALL
def test_inputs_are_left_alone(method: str) -> None:
    base, one, two = tensors(1, 3)
    before = [t.clone() for t in (base, one, two)]
    MERGE_METHODS[method]([one, two], base)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, one, two), strict=True))


def test_known_values() -> None:
    base, one, two = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert linear([one, two], None, weights=[1, 0]).tolist() == [1, 0]
    assert linear([one, two], None, weights=[1, 3]).tolist() == [0.25, 0.75]
    half = 2**-0.5
    torch.testing.assert_close(slerp([one, two], None, t=0.5), torch.tensor([half, half]))
    assert slerp([one, two], None, t=0.0).tolist() == [1, 0]
    assert task_arithmetic([one, two], base, scale=0.5).tolist() == [0.5, 0.5]
    # A model that moved twice as far weighs four times as much.
    torch.testing.assert_close(varm([one, 2 * two], base), torch.tensor([0.2, 1.6]))
    assert varm([base, one], base).tolist() == [1, 0]


def test_a_wrong_number_of_models_or_weights_is_refused() -> None:
    one, two, three = tensors(2, 3)
    with pytest.raises(ValueError, match="two models"):
        slerp([one, two, three], None)
    with pytest.raises(ValueError, match="2 weights for 3 models"):
        linear([one, two, three], None, weights=[1, 2])
    assert needs_base("varm")
    assert not needs_base("linear")


def test_varm_equals_the_recorded_float64_result(shared: Path) -> None:
    golden = shared / "golden" / "merge"
    models = {n: load_file(golden / "models" / n / "model.safetensors") for n in "abc"}
    base = load_file(golden / "models" / "base" / "model.safetensors")
    exact = load_file(golden / "exact" / "varm_matrix.safetensors")
    for name, expected in exact.items():
        found = varm([models[n][name] for n in "abc"], base[name])
        torch.testing.assert_close(found.double(), expected, atol=3e-7, rtol=1e-6)


def test_linear_and_task_arithmetic_equal_mergekit(shared: Path) -> None:
    import yaml

    golden = shared / "golden" / "merge"
    checked = 0
    for path in sorted((golden / "configs").glob("*.yml")):
        config = yaml.safe_load(path.read_text())
        method, options = config["merge_method"], config.get("parameters", {})
        listed = config.get("models", [])
        plain = all(set(m.get("parameters", {})) <= {"weight"} for m in listed)
        if method not in ("linear", "task_arithmetic") or config.get("dtype") != "float32":
            continue
        if not plain or not set(options) <= {"normalize", "lambda"}:
            continue
        normal = options.get("normalize", method == "linear")
        weights = [m["parameters"]["weight"] for m in listed if "parameters" in m]
        if any(isinstance(w, list) for w in weights) or normal != (method == "linear"):
            continue
        names = [m["model"].split("/")[-1] for m in listed if "parameters" in m]
        models = [load_file(golden / "models" / n / "model.safetensors") for n in names]
        base = load_file(golden / "models" / "base" / "model.safetensors")
        expected = load_file(golden / "mergekit" / f"{path.stem}.safetensors")
        extra = {"scale": options["lambda"]} if "lambda" in options else {}
        for name, tensor in expected.items():
            given = [m[name] for m in models]
            found = MERGE_METHODS[method](given, base[name], weights=weights, **extra)
            torch.testing.assert_close(found, tensor.float(), atol=3e-7, rtol=0)
        checked += 1
    assert checked, "no configuration was compared"


@pytest.fixture
def folders(tiny: dict[str, Path], tmp_path: Path) -> list[Path]:
    out = []
    for number in (1, 2):
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        g = torch.Generator().manual_seed(number)
        content = load_file(tiny["llama"] / "model.safetensors")
        moved = {k: v + 0.01 * torch.randn(v.shape, generator=g) for k, v in content.items()}
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
        for path in tiny["llama"].glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        out.append(folder)
    return out


def test_a_merged_folder_loads_and_holds_the_mean(folders: list[Path], tmp_path: Path) -> None:
    from fusion.models import load_model, load_tokenizer

    out = tmp_path / "out"
    out.mkdir()
    facts = merge(folders, None, out, "linear", {})
    one, two, merged = (load_file(f / "model.safetensors") for f in (*folders, out))
    assert facts["tensors"] == len(one)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)
    load_model(out)
    load_tokenizer(out)


def test_shards_do_not_change_a_byte(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusion import checkpoints

    (tmp_path / "whole").mkdir()
    merge(folders, None, tmp_path / "whole", "linear", {})
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 20_000)
    (tmp_path / "cut").mkdir()
    merge(folders, None, tmp_path / "cut", "linear", {})
    shards = sorted((tmp_path / "cut").glob("model-*.safetensors"))
    assert len(shards) > 1
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    together = {k: v for shard in shards for k, v in load_file(shard).items()}
    assert set(index["weight_map"]) == set(together)
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(tensor, together[name])
    # The pieces as input give the same again.
    for path in tmp_path.joinpath("whole").glob("*.json"):
        (tmp_path / "cut" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "again").mkdir()
    merge([tmp_path / "cut"], None, tmp_path / "again", "linear", {})


def test_models_that_do_not_fit_are_named_before_any_work(
    folders: list[Path], tiny: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RunError, match=r"is in m1 but not in neox|embed"):
        merge([folders[0], tiny["neox"]], None, out, "linear", {})
    assert not list(out.iterdir())


def test_a_truncated_file_is_named(folders: list[Path], tmp_path: Path) -> None:
    weights = folders[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(RunError, match=r"m2.*not a whole safetensors file"):
        merge(folders, None, tmp_path, "linear", {})


def test_refused_parameters_are_the_recipes_fault(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="3 weights for 2 models"):
        merge(folders, None, tmp_path, "linear", {"weights": [1, 2, 3]})
