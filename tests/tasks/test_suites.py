"""Suites and their task files: names, prompts, no leaks, and parity with lm-eval's own tasks."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from tasks.datasets import DATASETS
from tasks.suite import DEFINITIONS, known_suites, load_suite


def functions(file: str = "data.py") -> ModuleType:
    """As lm-eval reads them: the file is loaded by its path."""
    spec = importlib.util.spec_from_file_location("definitions", DEFINITIONS / file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", known_suites())
def test_a_suite_is_named_as_its_file_and_its_tasks_exist(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    files = [p for p in DEFINITIONS.rglob("*.yaml") if p.parent.name != "tiny"]
    texts = [path.read_text() for path in files]
    if suite.stock:
        texts = [(Path(lm_eval.__file__).parent / "tasks" / suite.stock).read_text()]
    for task in suite.tasks:
        assert any(f"task: {task.name}\n" in text for text in texts), task.name
    assert set(suite.datasets) <= set(DATASETS)
    assert {name for _, name in suite.splits} <= set(suite.datasets)


def test_every_task_file_finds_its_functions() -> None:
    files = [path for path in DEFINITIONS.rglob("*.yaml") if not path.name.startswith("_")]
    found = [load_yaml(p, resolve_func=True) for p in files if "task: " in p.read_text()]
    assert len(found) > 100
    assert {task["task"] for task in found if callable(task.get("custom_dataset"))} >= {
        "kfuse_mt_bench_math",
        "kfuse_alpaca_eval",
    }


def test_judges_grades_and_shares_of_right_answers_have_no_common_mean() -> None:
    for name in known_suites():
        suite = load_suite(name)
        metrics = {task.metric for task in suite.tasks}
        judged = {"rating": {"rating"}, "preference": {"lc_win_rate"}}.get(suite.judged)
        assert metrics == judged if judged else not metrics & {"rating", "lc_win_rate"}, name


def test_unknown_suites_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="commonsense"):
        load_suite("comonsense")
    with pytest.raises(ValueError, match="bbh81"):
        load_suite("bbh")


def test_the_81_exemplars_are_asked_without_their_own_solution() -> None:
    tasks = load_suite("bbh81").tasks
    assert len(tasks) == 27
    total = 0
    for task in tasks:
        documents = functions().exemplar_documents(task.name.removeprefix("kfuse_bbh81_"))
        total += len(documents)
        for document in documents:
            assert document["input"] not in document["shots"]
            assert document["prompt"].count("Let's think step by step.") == 3
            assert document["prompt"].endswith("A: Let's think step by step.\n")
            assert document["prompt"].count(document["input"]) == 1
    assert total == 81


def test_prompts_are_those_of_the_stock_tasks(shared: Path, tmp_path: Path) -> None:
    """The same ARC question through our task and through lm-eval's template: equal requests."""
    with gzip.open(shared / "data" / "arc" / "ARC-Easy" / "test.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines][:20]
    import lm_eval

    stock = Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_easy.yaml"
    assert 'doc_to_text: "Question: {{question}}\\nAnswer:"' in stock.read_text()
    ours = [
        {
            "query": f"Question: {row['question']}\nAnswer:",
            "choices": row["choices"]["text"],
            "gold": row["choices"]["label"].index(row["answerKey"]),
        }
        for row in rows
    ]
    (tmp_path / "arc_easy.jsonl").write_text("\n".join(json.dumps(row) for row in ours))
    manager = TaskManager(
        include_path=str(DEFINITIONS), include_defaults=False, metadata={"data_dir": str(tmp_path)}
    )
    task = manager.load(["kfuse_arc_easy"])["tasks"]["kfuse_arc_easy"]
    task.build_all_requests(rank=0, world_size=1)
    first = [i for i in task.instances if i.doc_id == 0]
    assert [i.args for i in first] == [
        (f"Question: {rows[0]['question']}\nAnswer:", f" {text}")
        for text in rows[0]["choices"]["text"]
    ]


def test_the_published_protocol_takes_what_stands_before_the_full_stop() -> None:
    said = ["So the answer is (B). Q: …", "It is 4.", "The answer is 3.5. The answer is 4.", ""]
    found = functions("bbh.py").answers([[text] for text in said], [{}] * 4)
    assert found == [["(B)"], ["It is 4."], ["3"], [""]]
