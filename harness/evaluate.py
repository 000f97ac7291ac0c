"""What a suite asks, by lm-eval's tasks, prompts and filters; `answering` has it answered.

Prompts are formed once from all items of a measurement, whatever is left to do and whoever does it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import get_aggregation
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from fusion.conversations import asking, said_in
from fusion.errors import RunError
from harness.hashing import data_hashes, definition_hash
from harness.store import identity
from reports.corpus import CORPUS_METRICS
from tasks.suite import DEFINITIONS, Suite, Task, load_suite

FEWSHOT_SEED = 1234  # lm-eval's own default


@dataclass
class Item:
    """One question of one task, with its requests in lm-eval's order."""

    task: str
    doc_id: int
    doc: dict
    requests: list[Instance]

    @property
    def key(self) -> tuple[str, int]:
        """What identifies it in the records."""
        return self.task, self.doc_id

    @cached_property
    def hashes(self) -> tuple[str, str]:
        """Of the question, and of everything that the model is asked."""
        asked = json.dumps([list(map(str, request.args)) for request in self.requests])
        return identity(self.doc)[:16], identity(asked)[:16]

    @property
    def prompt(self) -> str:
        """The text that the model sees first."""
        return str(self.requests[0].args[0])


@dataclass
class Loaded:
    """A suite with lm-eval's task objects and the items to measure."""

    suite: Suite
    tasks: dict[str, Any]
    items: list[Item]
    totals: dict[str, int]
    manager: TaskManager
    hashes: dict[str, str] = field(default_factory=dict)  # sha256 of each set of questions

    @cached_property
    def protocol(self) -> str:
        """Hash of what defines the suite and of every question and prompt that is measured."""
        asked = [[*item.key, *item.hashes] for item in self.items]
        return identity([definition_hash(self.suite.name), asked, self.hashes])[:12]


def load(name: str, data: Path, limit: int | None, seed: int, given: Suite | None = None) -> Loaded:
    """The items of a suite: all of them, or a seeded sample with an equal share for each task.

    name: a suite, or lm_eval:TASK for a stock task. given: use this suite, whose task files lie
    beside its data. RunError if the data cannot be had.
    """
    stock = name.startswith("lm_eval:")
    if stock:
        manager = TaskManager()
        tasks = _stock(name[8:], manager)
        suite = _stock_suite(name, tasks)
    else:
        suite = given or load_suite(name)
        manager = TaskManager(
            include_path=str(data if given else DEFINITIONS),
            include_defaults=False,
            metadata={"data_dir": str(data)},
        )
        try:
            tasks = manager.load([task.name for task in suite.tasks])["tasks"]
        except (OSError, ValueError) as error:  # of `datasets`, where the hub is out of reach
            what = str(error).partition("\n")[0][:200]
            raise RunError(
                f"suite {name}: its questions cannot be had ({what}); it needs the network once, "
                "or a copy of the data in HF_DATASETS_CACHE"
            ) from error
        tasks = {task.name: tasks[task.name] for task in suite.tasks}
    totals = {task: len(list(tasks[task].eval_docs)) for task in tasks}
    chosen = sample(totals, limit, seed)
    items: list[Item] = []
    # lm-eval takes an empty list of documents for all of them.
    tasks = {task: object_ for task, object_ in tasks.items() if chosen[task]}
    for task, object_ in tasks.items():
        _build(object_, chosen[task], suite.chat)
        _say_windows(object_)
        _say_messages(object_)
        items += _items(task, object_.instances)
    return Loaded(suite, tasks, items, totals, manager, data_hashes(data))


def _build(task: Any, chosen: list[int], chat: bool) -> None:
    """Form a task's requests; as conversations, for all templates at once, where a suite says so.

    lm-eval lays out the turns and hands them to a template; ours puts them down as they are, beside
    what lm-eval asks without a template.
    """

    def write(turns: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return asking([(turn["role"], turn["content"]) for turn in turns])

    def build(**how: Any) -> list[Instance]:
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        with patch("lm_eval.api.task.tqdm", lambda items, **_: items):  # a bar a task is noise
            task.build_all_requests(samples=chosen, rank=0, world_size=1, **how)
        return task.instances

    plain = build()
    if not chat:
        return
    how = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": write}
    for instance, other in zip(build(**how), plain, strict=True):
        turns, _ = said_in(instance.args[0])
        instance.arguments = (asking(turns, other.args[0]), *instance.args[1:])


def _say_windows(task: Any) -> None:
    """Put a task's rule of windows beside each text, as lm-eval puts stops beside a prompt."""
    metadata = task.config.metadata or {}
    rule = {key: metadata[key] for key in ("window", "stride") if key in metadata}
    for instance in task.instances if rule else []:
        instance.arguments = (*instance.args, rule)


def _say_messages(task: Any) -> None:
    """Put a document's conversation in place of its prompt: every row writes it by its template."""
    for instance in task.instances:
        if "messages" in instance.doc:
            turns = [(role, content) for role, content in instance.doc["messages"]]
            instance.arguments = (asking(turns), *instance.args[1:])


def sample(totals: dict[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Which documents of each task are measured: `limit` in all, an equal share for each task.

    A task that has fewer gives its share to the others. The draw depends on the seed and the task's
    name only, so that adding a task changes no other task's items beyond the share.
    """
    if limit is None or limit >= sum(totals.values()):
        return {task: list(range(total)) for task, total in totals.items()}
    share = dict.fromkeys(totals, 0)
    left = limit
    while left > 0:
        open_tasks = [task for task in totals if share[task] < totals[task]]
        for task in open_tasks[:left]:
            share[task] += 1
        left -= min(left, len(open_tasks))
    out = {}
    for task, total in totals.items():
        key = [seed, *task.encode()]
        order = np.random.default_rng(key).permutation(total)
        out[task] = sorted(int(i) for i in order[: share[task]])
    return out


def _stock(name: str, manager: TaskManager) -> dict[str, Any]:
    try:
        return dict(manager.load([name])["tasks"])
    except Exception as error:  # lm-eval and datasets raise whatever their parts raise
        raise RunError(
            f"lm_eval:{name}: not loaded ({type(error).__name__}: {str(error)[:300]}); check the "
            "task's name with `lm_eval ls tasks`, and that the hub or a local copy of its data "
            "(HF_DATASETS_CACHE) is there"
        ) from error


def _stock_suite(name: str, tasks: dict[str, Any]) -> Suite:
    listed = []
    for task, object_ in tasks.items():
        if object_.config.unsafe_code:
            raise RunError(f"{name}: runs generated code outside the sandbox; use the suite 'code'")
        better = object_.higher_is_better()
        for metric in ("acc_norm", "exact_match", *better):
            if metric in better:
                break
        flag = bool(better[metric])
        shots = int(object_.config.num_fewshot or 0)
        listed.append(Task(task, metric_name(object_, metric), flag, None, task, shots=shots))
    title = f"{name} as lm-eval ships it"
    # A corpus' score and a share of right answers have no common mean.
    apart = len(listed) > 1 and any(task.metric in CORPUS_METRICS for task in listed)
    return Suite(name, title, tuple(listed), rule="apart" if apart else "macro")


def metric_name(task: Any, metric: str) -> str:
    """A metric's name in records: lm-eval's, but `mean_bleu` for a mean of items' own BLEU."""
    if metric in CORPUS_METRICS and task.aggregation().get(metric) is not get_aggregation(metric):
        return f"mean_{metric}"
    return metric


def _items(task: str, instances: Sequence[Instance]) -> Iterator[Item]:
    by_doc: dict[int, list[Instance]] = {}
    for instance in instances:
        by_doc.setdefault(int(instance.doc_id), []).append(instance)
    for doc_id, requests in by_doc.items():
        requests.sort(key=lambda request: request.idx)
        yield Item(task, doc_id, dict(requests[0].doc), requests)


class _Replay(LM):
    """An lm-eval model that says again what the items' requests were answered."""

    def __init__(self, items: Sequence[Item]) -> None:
        super().__init__()
        self.said = {
            (item.task, item.doc_id, request.idx): request.resps
            for item in items
            for request in item.requests
        }
        self.times: dict[tuple, int] = {}

    def _again(self, requests: list[Instance], disable_tqdm: bool = True) -> list:
        out = []
        for request in requests:
            key = (request.task_name, request.doc_id, request.idx)
            answers = self.said[key]
            turn = self.times.get(key, 0)
            self.times[key] = turn + 1
            out.append(answers[turn % len(answers)])
        return out

    loglikelihood = loglikelihood_rolling = generate_until = _again
    tokenizer_name = ""

    def chat_template(self, chat_template: bool | str = False) -> str:
        """No template: rows have their own."""
        return ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Who says what."""
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in chat_history)


def write_as_lm_eval(loaded: Loaded, model: str, folder: Path) -> None:
    """What lm-eval itself writes of these answers: results JSON and a samples JSONL a task.

    The items' requests hold the answers (`scores.filtered`); lm-eval's own run loop asks for them
    again and its own tracker writes, so that keys and values are lm-eval's.
    """
    chosen: dict[str, list[int]] = {}
    for item in loaded.items:
        chosen.setdefault(item.task, []).append(item.doc_id)
    tracker = EvaluationTracker(output_path=str(folder))
    with patch("lm_eval.api.task.tqdm", lambda items, **_: items):
        results: Any = lm_eval.simple_evaluate(
            model=_Replay(loaded.items),
            model_args={"model": model},
            tasks=list(loaded.tasks),
            task_manager=loaded.manager,
            samples=chosen,
            evaluation_tracker=tracker,
            fewshot_random_seed=FEWSHOT_SEED,
            apply_chat_template=loaded.suite.chat,
            fewshot_as_multiturn=loaded.suite.chat,
        )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
