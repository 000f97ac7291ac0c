"""Measure one row on one suite: lm-eval's tasks, prompts, filters and metrics; our run loop.

Raw records are appended as Parquet parts, a batch of items each, and scores are derived from them
in a second pass that needs no model, so an interrupted measurement loses one batch, and every
metric can be computed again. Prompts are built once for the whole task, whatever is left to do.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from fusion.errors import RunError
from harness.hashing import data_hashes, definition_hash
from harness.packing import item_batches
from harness.plan import Plan, Step
from harness.progress import bar, say
from harness.samples import append, columns, parts
from harness.store import finish, identity, read_manifest
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
    hashes: dict[str, str] = field(default_factory=dict)  # sha256 of each set of questions


def load(name: str, data: Path, limit: int | None, seed: int, given: Suite | None = None) -> Loaded:
    """The items of a suite: all of them, or a seeded sample with an equal share for each task.

    name: a suite, or lm_eval:TASK for a stock task. given: use this suite, whose task files lie
    beside its data. RunError if the data cannot be had.
    """
    stock = name.startswith("lm_eval:")
    if stock:
        tasks = _stock(name[8:])
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
        object_.set_fewshot_seed(seed=FEWSHOT_SEED)
        with patch("lm_eval.api.task.tqdm", lambda items, **_: items):  # a bar a task is noise
            object_.build_all_requests(samples=chosen[task], rank=0, world_size=1)
        items += _items(task, object_.instances)
    return Loaded(suite, tasks, items, totals, data_hashes(data))


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


def _stock(name: str) -> dict[str, Any]:
    try:
        return dict(TaskManager().load([name])["tasks"])
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
        listed.append(Task(task, metric, flag, None, task, shots=shots))
    return Suite(name=name, title=f"{name} as lm-eval ships it", tasks=tuple(listed))


def _items(task: str, instances: Sequence[Instance]) -> Iterator[Item]:
    by_doc: dict[int, list[Instance]] = {}
    for instance in instances:
        by_doc.setdefault(int(instance.doc_id), []).append(instance)
    for doc_id, requests in by_doc.items():
        requests.sort(key=lambda request: request.idx)
        yield Item(task, doc_id, dict(requests[0].doc), requests)


def measure(plan: Plan, step: Step, loaded: Loaded, lm: Any) -> None:
    """Append the records that are missing, then derive scores and write the manifest."""
    folder = step.folder
    folder.mkdir(parents=True, exist_ok=True)
    started, before = time.monotonic(), lm.forward_tokens
    done = set(zip(*columns(folder, ["task", "doc_id"]), strict=True))
    waiting = [item for item in loaded.items if item.key not in done]
    label = f"{step.rows[0]} · {step.name}"
    if done:
        say(f"{label}: {len(done)} of {len(loaded.items)} items measured before, going on")
    with bar(label, len(waiting)) as progress:
        finished = 0
        for batch in item_batches(waiting, getattr(lm, "members", [lm])[0].generate_rows):
            append(folder, [_record(item, *answer) for item, answer in _answer(lm, batch)])
            finished += len(batch)
            progress(finished)
    cost = _cost(folder, time.monotonic() - started, lm.forward_tokens - before)
    score(plan, step, loaded, cost)


def _cost(folder: Path, seconds: float, tokens: int) -> dict[str, float]:
    """What measuring took, added to what an interrupted run had noted."""
    return {
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "peak_memory_bytes": psutil.Process().memory_info().rss,
    }


def _answer(lm: Any, batch: Sequence[Item]) -> Iterator[tuple[Item, tuple[list, int]]]:
    """What the model says to each item: one response a request, and the tokens it generated."""
    kind = batch[0].requests[0].request_type
    requests = [request for item in batch for request in item.requests]
    before = lm.forward_tokens
    if kind == "generate_until":
        answers: list[Any] = lm.generate(requests)
    elif kind == "loglikelihood_rolling":
        answers = lm.loglikelihood_rolling(requests)
    else:
        answers = lm.loglikelihood(requests, disable_tqdm=True)
    share = (lm.forward_tokens - before) // max(1, len(batch))
    each = iter(answers)
    for item in batch:
        yield item, ([next(each) for _ in item.requests], share)


def _record(item: Item, answers: list, tokens: int) -> dict[str, Any]:
    kind = item.requests[0].request_type
    generated = kind == "generate_until"
    rolling = kind == "loglikelihood_rolling"
    choices = [] if generated or rolling else [str(r.args[1]) for r in item.requests]
    prompts = json.dumps([list(map(str, r.args)) for r in item.requests])
    return {
        "task": item.task,
        "doc_id": item.doc_id,
        "doc_hash": identity(item.doc)[:16],
        "prompt_hash": identity(prompts)[:16],
        "cluster": str(item.doc.get("cluster", item.doc_id)),
        "gold": json.dumps(item.doc.get("gold", item.doc.get("target")), default=str),
        "output_type": kind,
        "choice_ll": [float(a) if rolling else float(a[0]) for a in answers if not generated],
        "choice_greedy": [] if generated or rolling else [bool(a[1]) for a in answers],
        "choice_bytes": [len(c.encode()) for c in choices],
        "choice_chars": [len(c) for c in choices],
        "text_bytes": len(item.prompt.encode()) if rolling else 0,
        "generation": [a.text for a in answers] if generated else [],
        "finish_reason": [a.finish_reason for a in answers] if generated else [],
        "prompt_tokens": tokens,
        "generated_tokens": sum(a.tokens for a in answers) if generated else 0,
    }


def score(plan: Plan, step: Step, loaded: Loaded, cost: dict[str, float] | None = None) -> None:
    """Derive scores from the records, without the model, and write the manifest."""
    folder = step.folder
    table = pa.concat_tables([pq.read_table(path) for path in parts(folder)])
    records = {(row["task"], row["doc_id"]): row for row in table.to_pylist()}
    missing = [item.key for item in loaded.items if item.key not in records]
    if missing:
        raise RunError(f"{folder}: {len(missing)} items have no record, the first is {missing[0]}")
    for item in loaded.items:
        for number, request in enumerate(item.requests):
            request.resps = [_response(records[item.key], number)]
    for object_ in loaded.tasks.values():
        object_.apply_filters()
    outcomes = _execute(plan, loaded, records) if loaded.suite.executes_code else {}
    rows = [
        row
        for item in loaded.items
        for row in _scores(loaded, item, records[item.key], outcomes.get(item.key))
    ]
    frame = pd.DataFrame(rows, columns=SCORE_COLUMNS)
    frame = frame.astype({"value": "float64", "weight": "float64", "doc_id": "int64"})
    partial = folder / ".scores.parquet"
    frame.to_parquet(partial, index=False)
    partial.replace(folder / "scores.parquet")
    finish(folder, _manifest(plan, step, loaded, frame, cost or {}))


SCORE_COLUMNS = ["task", "doc_id", "cluster", "metric", "value", "weight", "outcome", "extracted"]


def _response(record: dict, number: int) -> Any:
    if record["output_type"] == "generate_until":
        return record["generation"][number]
    if record["output_type"] == "loglikelihood_rolling":
        return record["choice_ll"][number]
    return record["choice_ll"][number], record["choice_greedy"][number]


def _scores(loaded: Loaded, item: Item, record: dict, executed: Any) -> Iterator[dict[str, Any]]:
    """One row for each metric that lm-eval derives from an item."""
    task = next(t for t in loaded.suite.tasks if t.name == item.task)
    base = {"task": item.task, "doc_id": item.doc_id, "cluster": record["cluster"]}
    if executed is not None:
        value = {"pass": 1.0, "infra": math.nan}.get(executed, 0.0)
        extra = {"metric": task.metric, "value": value, "weight": 1.0}
        yield base | extra | {"outcome": executed, "extracted": None}
        return
    object_ = loaded.tasks[item.task]
    for filter_name in item.requests[0].filtered_resps:
        if task.filter not in ("none", filter_name) and len(item.requests[0].filtered_resps) > 1:
            continue
        answers = [request.filtered_resps[filter_name] for request in item.requests]
        extracted = answers[0] if isinstance(answers[0], str) else None
        outcome = _outcome(record, extracted)
        for metric, value in object_.process_results(item.doc, answers).items():
            weight = 1.0
            if metric == "bits_per_byte":
                total, weight = value
                value = -total / (weight * math.log(2))
            if not isinstance(value, (int, float, np.number, bool)):
                continue
            found = {"metric": metric, "value": float(value), "weight": float(weight)}
            yield base | found | {"outcome": outcome, "extracted": extracted}


def _outcome(record: dict, extracted: str | None) -> str:
    if record["finish_reason"]:
        if "length" in record["finish_reason"]:
            return "truncated"
        return "unextracted" if extracted == "[invalid]" else "ok"
    if record["output_type"] == "loglikelihood_rolling":
        return "ok"
    best = sorted(record["choice_ll"], reverse=True)
    return "tie" if len(best) > 1 and best[0] == best[1] else "ok"


def _execute(plan: Plan, loaded: Loaded, records: dict) -> dict[tuple[str, int], str]:
    from harness.execution import execute

    programs = [records[item.key] | {"doc": item.doc} for item in loaded.items]
    with bar(f"{loaded.suite.name} · executing programs", len(programs)) as progress:
        workers = plan.recipe.machine.workers
        found = execute(programs, allow=True, workers=workers, progress=progress)
    return {item.key: outcome for item, outcome in zip(loaded.items, found, strict=True)}


def _manifest(
    plan: Plan, step: Step, loaded: Loaded, frame: pd.DataFrame, cost: dict
) -> dict[str, Any]:
    from importlib.metadata import version

    recipe, row = plan.recipe, step.rows[0]
    definition = definition_hash(step.name)
    data = [
        identity([i.task, i.doc_id, i.doc, [str(r.args) for r in i.requests]]) for i in loaded.items
    ]
    listed = []
    for task in loaded.suite.tasks:
        chosen = frame[(frame.task == task.name) & (frame.metric == task.metric)]
        protocol: dict[str, Any] = {"definition": definition, "task": task.name}
        protocol |= {"metric": task.metric, "data": loaded.hashes}
        listed.append(
            {
                "task": task.name,
                "title": task.title,
                "metric": task.metric,
                "higher_is_better": task.higher_is_better,
                "chance": task.chance,
                "shots": task.shots,
                "n": int(chosen.value.notna().sum()),
                "n_total": loaded.totals[task.name],
                "protocol": identity(protocol)[:12],
            }
        )
    primary = frame[frame.metric.isin({task.metric for task in loaded.suite.tasks})]
    health = {
        kind: int((primary.outcome == kind).sum())
        for kind in ("truncated", "unextracted", "tie", "infra")
    }
    from harness.ensembles import MIXING

    return {
        "kind": "evaluation",
        "row": row,
        "suite": step.name,
        "rule": loaded.suite.rule,
        "model_identity": plan.identities[row],
        "identity": step.identity,
        "content": step.content,
        "protocol": identity([definition, data, loaded.hashes])[:12],
        "data": loaded.hashes,
        "seed": recipe.seed,
        "limit": recipe.limit(step.name),
        "partial": len(loaded.items) < sum(loaded.totals.values()),
        "dtype": recipe.evaluate.dtype,
        "lm_eval": version("lm-eval"),
        "mixing": MIXING if plan.folders[row] is None else None,
        "tasks": listed,
        "health": health,
        "notes": [],
        "cost": cost,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def rescore(plan: Plan, step: Step, loaded: Loaded) -> None:
    """Compute every metric of a finished run again from its records."""
    manifest = read_manifest(step.folder)
    if manifest is None:
        raise RunError(f"{step.folder}: not measured yet")
    score(plan, step, loaded, manifest["cost"])


__all__ = ["Item", "Loaded", "Task", "load", "measure", "parts", "rescore", "sample", "score"]
