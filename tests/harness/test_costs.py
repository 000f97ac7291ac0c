"""The cost ledger on tiny models, and training that comes to another row's FLOPs."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fusion.corpus import drawn_order, read_blocks, text_bytes
from fusion.distributions import open_store
from fusion.flops import forward, size, training
from fusion.measures import bits_per_byte
from fusion.models import load_model
from harness.build import build
from harness.costs import Meter, counting, flops, gpus, in_order, source_lengths, spent_on
from harness.machine import held_gpus
from harness.measuring import measure_rows
from harness.plan import Plan, plan
from harness.recipe import Loaded, parse
from harness.report import write
from harness.store import read_manifest

RECIPE = """
sources:
  llama: {path: "tiny:llama"}
  gemma: {path: "tiny:gemma"}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 320}
variants:
  fused: {train: {init: llama, batch_blocks: 2, fuse: {sources: [llama, gemma], function: min_ce,
    clm_weight: 0.9}}}
  equal: {train: {init: llama, batch_blocks: 2, budget: fused}}
  town: {train: {init: llama, domains: [town]}}
  merged: {merge: {inputs: [fused, equal], method: linear}}
  pack: {ensemble: {members: [llama, gemma], rule: top1}}
evaluate: {suites: [tiny_choice], limit: 4}
reference: equal
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    made = plan(parse(RECIPE, "r"), tmp_path_factory.mktemp("home"))
    assert build(made, ["merged", "town", "pack"]) == {}
    rows = ["llama", "gemma", "fused", "pack"]
    assert measure_rows(made, {row: made.evaluations(row) for row in rows}) == {}
    return made


def manifest(built: Plan, row: str) -> dict[str, Any]:
    folder = built.folders[row]
    assert folder
    found = read_manifest(folder)
    assert found
    return found


def steps(built: Plan, kind: str) -> list[Any]:
    return [step for step in built.steps.values() if step.kind == kind]


def test_every_stage_says_what_it_cost(built: Plan) -> None:
    for step in built.builds():
        found = read_manifest(step.folder)
        assert found
        cost = found["cost"]
        assert cost["seconds"] > 0
        assert cost["cpu_seconds"] >= 0
        assert cost["gpu_seconds"] == 0
        assert 20_000_000 < cost["peak_memory_bytes"] < 24 << 30
        # The manifest itself comes after the sum, and is none of it.
        inside = [f for f in step.folder.rglob("*") if f.is_file() and f.name != "manifest.json"]
        assert cost["bytes"] == sum(f.stat().st_size for f in inside) > 0
        if step.kind in ("capture", "train"):
            assert cost["flops"] > cost["tokens"] > 0
        else:
            assert cost["flops"] is None


def test_a_capture_costs_what_the_source_reads(built: Plan) -> None:
    for step in steps(built, "capture"):
        rows = [entry["positions"] for entry in open_store(step.folder).index]
        blocks = read_blocks(built.steps[step.content["corpus"]].folder / "blocks.parquet")
        assert source_lengths(built, step.content["row"], blocks) == rows
        folder = built.folders[step.content["row"]]
        assert folder
        found = read_manifest(step.folder)
        assert found
        assert found["cost"]["flops"] == forward(size(load_model(folder)), rows)


def test_an_equal_budget_is_reached_within_a_step(built: Plan) -> None:
    fused, equal = manifest(built, "fused"), manifest(built, "equal")
    paid = fused["cost"]["flops"]
    for step in steps(built, "capture"):
        found = read_manifest(step.folder)
        assert found
        paid += found["cost"]["flops"]
    assert equal["facts"]["budget_flops"] == paid
    folder = built.folders["llama"]
    assert folder
    most = training(size(load_model(folder)), [64, 64])
    assert paid <= equal["cost"]["flops"] < paid + most
    assert equal["facts"]["steps"] > fused["facts"]["steps"]
    log = built.folders["equal"]
    assert log
    with (log / "training.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == equal["facts"]["steps"]
    # The schedule is stretched over all steps: it does not start anew with a second pass.
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.1 * rates[0]


def test_what_a_budget_is_filled_with_comes_in_the_seeds_order(built: Plan) -> None:
    other = plan(parse(RECIPE, "r", ["variants.equal.train.seed=5"]), built.home)
    packed, drawn = (
        [[piece.text for piece in block] for block in in_order(one, one.steps[key])]
        for one in (built, other)
        for key in [one.identities["equal"]]
    )
    order = drawn_order(len(packed), 5)
    assert order != sorted(order)
    assert drawn == [packed[place] for place in order]


def test_the_blocks_that_each_source_won(built: Plan) -> None:
    content = built.steps[built.identities["fused"]].content
    blocks = read_blocks(built.steps[content["corpus"]].folder / "blocks.parquet")
    stores = [open_store(built.steps[key].folder) for key in content["fuse"]["sources"]]
    best = [
        int(np.argmin(bits_per_byte([store.read(n, b) for store in stores], b)))
        for n, b in enumerate(blocks)
    ]
    assert manifest(built, "fused")["facts"]["won"] == {
        "llama": best.count(0),
        "gemma": best.count(1),
    }
    assert "won" not in manifest(built, "equal")["facts"]


def test_a_fused_row_costs_one_forward_and_an_ensemble_all_of_them(built: Plan) -> None:
    costs = {}
    for row in ("llama", "gemma", "fused", "pack"):
        (step,) = built.evaluations(row)
        found = read_manifest(step.folder)
        assert found
        costs[row] = found["cost"]
        inside = [f for f in step.folder.iterdir() if f.name != "manifest.json"]
        assert costs[row]["bytes"] == sum(f.stat().st_size for f in inside)
        assert costs[row]["cpu_seconds"] > 0
    token = {row: cost["flops_per_token"] for row, cost in costs.items()}
    assert token["fused"] == token["llama"]
    assert token["pack"] == token["llama"] + token["gemma"]
    assert costs["fused"]["flops"] == costs["llama"]["flops"]
    for row in ("llama", "gemma"):
        folder = built.folders[row]
        assert folder
        model = size(load_model(folder))
        assert costs[row]["flops"] > 2 * model.body * costs[row]["tokens"]


def test_the_report_shows_what_rows_cost_and_beside_what_they_stand(built: Plan) -> None:
    loaded = Loaded("demo", RECIPE, (), built.recipe)
    _, files = write(built, loaded, {})
    index = files["html"].with_name("index.json")
    rows = {row["name"]: row for row in json.loads(index.read_text())["rows"]}
    assert {name: row["target"] for name, row in rows.items()} == {
        **dict.fromkeys(("llama", "fused", "equal", "town", "merged"), "llama"),
        "gemma": "gemma",
        "pack": None,
    }
    assert rows["fused"]["sources"] == rows["pack"]["sources"] == ["llama", "gemma"]
    assert rows["merged"]["sources"] == ["fused", "equal"]
    assert sum(rows["fused"]["won"].values()) == 5
    text = files["markdown"].read_text()
    for heading in ("Reference lines", "Rows beside their sources", "Blocks of the", "Cost"):
        assert f"## {heading}" in text
    costs = pd.read_csv(files["costs"])
    stages = list(costs[costs.row == "fused"].stage)
    fetched = ["fetch", "fetch", "pack"]
    assert stages == [*fetched, "capture", "map", "capture", "map", "train", "evaluate"]
    merged = costs[costs.row == "merged"]
    assert {"fused", "equal"} == set(merged[merged.stage == "train"].of)  # what it was made from
    (trained,) = costs[(costs.row == "fused") & (costs.of == "fused")].shared_by
    assert trained == 2  # fused, merged
    assert costs[costs.stage == "train"].flops.notna().all()
    lines = pd.read_csv(files["lines"])
    assert set(lines[lines.row == "fused"].line) == {
        "blocks won",
        "gap recovered",
        "forgotten",
        "emergent",
    }


def test_a_domain_is_trained_on_alone(built: Plan) -> None:
    content = built.steps[built.identities["town"]].content
    blocks = read_blocks(built.steps[content["corpus"]].folder / "blocks.parquet")
    assert {piece.domain for block in blocks for piece in block} == {"town"}
    assert text_bytes(blocks) > 0
    assert "town" in built.summaries["town"]


def test_an_unknown_domain_lists_those_there_are(home: Path) -> None:
    made = plan(parse(RECIPE, "r", ["variants.town.train.domains=[city]"]), home)
    reasons = build(made, ["town"])
    assert "no document of domain city; its domains: town, village" in reasons["town"]


def test_a_meter_sees_time_work_and_a_peak_that_has_passed() -> None:
    meter = Meter()
    before = meter.cost()
    block = np.ones(1 << 25)  # 256 MiB, gone before the end
    end = time.process_time() + 0.2
    while time.process_time() < end:
        block[::4096].sum()
    del block
    after = meter.cost()
    assert after["cpu_seconds"] >= 0.2
    assert after["seconds"] >= 0.2
    assert after["peak_memory_bytes"] - before["peak_memory_bytes"] > 200 << 20
    # A new one begins with a new peak.
    assert Meter().cost()["peak_memory_bytes"] < after["peak_memory_bytes"] - (100 << 20)


@pytest.mark.parametrize(("method", "passes"), [("fisher", 3), ("regmean", 1)])
def test_statistics_cost_what_the_model_reads(
    method: str, passes: int, home: Path, tiny: dict[str, Path]
) -> None:
    merge = f"{{merge: {{inputs: [a, b], method: {method}, parameters: {{blocks: 2}}}}}}"
    text = f"""
sources: {{a: {{path: "tiny:llama"}}, b: {{path: {tiny["llama"]}}}}}
corpus: {{path: "tiny:corpus", blocks: 64, tokens: 320}}
variants: {{m: {merge}}}
evaluate: {{suites: [tiny_choice]}}
reference: a
"""
    made = plan(parse(text, "r"), home)
    assert build(made, ["m"]) == {}
    step = steps(made, "statistics")[0]
    found = read_manifest(step.folder)
    assert found
    facts, cost = found["facts"], found["cost"]
    # Of a sequence of T tokens, T - 1 are predicted.
    read = facts["tokens"] + (facts["sequences"] if method == "fisher" else 0)
    assert cost["tokens"] == read
    folder = made.folders["a"]
    assert folder
    own = size(load_model(folder))
    weights = own.body + (own.head if method == "fisher" else 0)
    least = passes * 2 * weights * read
    assert least < cost["flops"] <= least + passes * 4 * own.attention * 64 * read
    assert held_gpus(made, step) == 0


def test_members_that_are_one_model_are_counted_once(tiny: dict[str, Path]) -> None:
    model = load_model(tiny["llama"])
    member = SimpleNamespace(model=model)
    with counting(SimpleNamespace(members=[member, member])) as twice, counting(member) as once:
        model(torch.tensor([[5, 6, 7]]))
    assert flops(twice) == flops(once) > 0
    assert spent_on(twice, 0)["flops_per_token"] == 2 * once[0].size.per_token


def test_what_gpus_hold_is_of_all_devices_and_unknown_elsewhere(
    monkeypatch: pytest.MonkeyPatch, built: Plan
) -> None:
    held, forgotten = {0: 0, 1: 700}, []
    fakes = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "max_memory_allocated": held.__getitem__,
        "reset_peak_memory_stats": forgotten.append,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert Meter(1).cost()["peak_gpu_memory_bytes"] == 700
    assert forgotten == [0, 1]
    # What torchrun's processes hold is theirs to know.
    cost = Meter(2, here=False).cost()
    assert "peak_gpu_memory_bytes" not in cost
    assert cost["gpu_seconds"] is not None
    assert Meter(None).cost()["gpu_seconds"] is None
    assert gpus([], SimpleNamespace(device="cuda:1")) == 1
    assert gpus([], SimpleNamespace(device="cpu")) == 0
    assert gpus([], SimpleNamespace(device=None)) is None
    (step,) = (step for step in steps(built, "train") if step.name == "town")
    assert held_gpus(built, step) == 1
    assert held_gpus(built, replace(step, kind="statistics")) == 1
    assert held_gpus(built, replace(step, kind="merge")) == 0
