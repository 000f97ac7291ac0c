"""From records to scores: lm-eval's filters and metrics, without a model.

What is computed here can be computed again from the same records, and comes to the same bytes.
Programs are executed in the sandbox at this stage, too.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fusion.errors import RunError
from harness.evaluate import Item, Loaded, packs
from harness.hashing import definition_hash
from harness.plan import Plan, Step
from harness.progress import bar
from harness.recipe import Recipe
from harness.rules import mixing
from harness.samples import read, spent
from harness.store import finish, identity, read_manifest, world

Records = dict[tuple[str, int], dict[str, Any]]


def filtered(step: Step, loaded: Loaded) -> Records:
    """The records by item, with lm-eval's filters applied to what they hold."""
    found = read(step.folder, [pack.label for pack in packs(step, loaded)])
    records = {(row["task"], row["doc_id"]): row for row in found}
    for item in loaded.items:
        for number, request in enumerate(item.requests):
            request.resps = _responses(records[item.key], number, len(item.requests))
    for object_ in loaded.tasks.values():
        object_.apply_filters()
    return records


def score(plan: Plan, step: Step, loaded: Loaded) -> None:
    """Derive scores from the records, without the model, and write the manifest.

    RunError names a part that is missing or not whole.
    """
    folder = step.folder
    records = filtered(step, loaded)
    outcomes = _execute(plan, loaded, records) if loaded.suite.executes_code else {}
    rows = [
        row
        for item in loaded.items
        for row in _scores(loaded, item, records[item.key], outcomes.get(item.key))
    ]
    frame = pd.DataFrame(rows, columns=SCORE_COLUMNS)
    frame = frame.astype({"value": "float64", "weight": "float64", "doc_id": "int64"})
    path = folder / "scores.parquet"
    partial = folder / f".{path.name}.{os.getpid()}"
    try:
        frame.to_parquet(partial, index=False)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise world(error, path) from error
    finish(folder, _manifest(plan, step, loaded, frame, records))


SCORE_COLUMNS = ["task", "doc_id", "cluster", "metric", "value", "weight", "outcome", "extracted"]


def _responses(record: dict, number: int, requests: int) -> list[Any]:
    """What lm-eval keeps of a request: a list of its answers, several where it was repeated."""
    if record["output_type"] == "generate_until":
        times = len(record["generation"]) // requests
        return record["generation"][number * times : (number + 1) * times]
    if record["output_type"] == "loglikelihood_rolling":
        return [record["choice_ll"][number]]
    return [(record["choice_ll"][number], record["choice_greedy"][number])]


def _scores(loaded: Loaded, item: Item, record: dict, executed: Any) -> Iterator[dict[str, Any]]:
    """One row for each metric that lm-eval derives from an item."""
    task = next(t for t in loaded.suite.tasks if t.name == item.task)
    base = {"task": item.task, "doc_id": item.doc_id, "cluster": record["cluster"]}
    if executed is not None:
        from harness.execution import summarise

        value, outcome, counts = summarise(executed)
        extra = {"metric": task.metric, "value": value, "weight": 1.0}
        yield base | extra | {"outcome": outcome, "extracted": counts}
        return
    object_ = loaded.tasks[item.task]
    for filter_name in item.requests[0].filtered_resps:
        if task.filter not in ("none", filter_name) and len(item.requests[0].filtered_resps) > 1:
            continue
        answers = [request.filtered_resps[filter_name] for request in item.requests]
        extracted = answers[0] if isinstance(answers[0], str) else None
        outcome = _outcome(loaded, item, record, answers)
        for metric, value in object_.process_results(item.doc, answers).items():
            weight = 1.0
            if metric == "bits_per_byte":
                total, weight = value
                value = -total / (weight * math.log(2))
            if not isinstance(value, (int, float, np.number, bool)):
                continue
            found = {"metric": metric, "value": float(value), "weight": float(weight)}
            yield base | found | {"outcome": outcome, "extracted": extracted}


def _outcome(loaded: Loaded, item: Item, record: dict, answers: list) -> str:
    """What is to be known about an item beside its score; the first that applies."""
    if "length" in record["finish_reason"]:
        return "truncated"
    if _unextracted(record, answers):
        return "unextracted"
    return "tie" if _tied(loaded, item, record) else "ok"


def _unextracted(record: dict, answers: list) -> bool:
    """Whether nothing that was generated held an answer: lm-eval's mark for that, or no text."""
    if record["output_type"] != "generate_until":
        return False
    texts = [t for answer in answers for t in ([answer] if isinstance(answer, str) else answer)]
    return all(str(text).strip() in ("", "[invalid]") for text in texts)


def _tied(loaded: Loaded, item: Item, record: dict) -> bool:
    """Whether the best two choices are equal as the task's primary metric compares them.

    Lengths are those of the choices without what stands before them, as lm-eval takes them.
    """
    object_ = loaded.tasks[item.task]
    if object_.OUTPUT_TYPE != "multiple_choice":
        return False
    (metric,) = {task.metric for task in loaded.suite.tasks if task.name == item.task}
    choices = [str(choice) for choice in object_.doc_to_choice(item.doc)]
    values = np.array(record["choice_ll"][: len(choices)])
    if metric == "acc_norm":
        values = values / np.array([float(len(choice)) for choice in choices])
    elif metric == "acc_bytes":
        values = values / np.array([float(len(choice.encode())) for choice in choices])
    elif metric == "acc_mutual_info":
        values = values - np.array(record["choice_ll"][len(choices) :])
    best = np.sort(values)[::-1]
    return len(best) > 1 and bool(best[0] == best[1])


def _health(loaded: Loaded, frame: pd.DataFrame, records: Records) -> dict[str, int]:
    """How many items were cut at the token limit, gave no answer, were tied, were not judged.

    An item may count more than once; what was cut counts though an answer was found in it.
    """
    metrics = {task.name: task.metric for task in loaded.suite.tasks}
    primary = frame[frame.metric == frame.task.map(metrics)]
    silent = 0
    for item in loaded.items:
        task = next(t for t in loaded.suite.tasks if t.name == item.task)
        found = item.requests[0].filtered_resps
        name = task.filter if task.filter in found else next(iter(found))
        silent += _unextracted(records[item.key], [r.filtered_resps[name] for r in item.requests])
    return {
        "truncated": sum("length" in record["finish_reason"] for record in records.values()),
        "unextracted": silent,
        "tie": sum(_tied(loaded, item, records[item.key]) for item in loaded.items),
        "infra": int((primary.outcome == "infra").sum()),
    }


def _cost(folder: Path) -> dict[str, Any]:
    """What measuring took, all interrupted runs and all processes together, from the ledger.

    seconds: in packs only; loading models, and packs that an interruption cut, are not known.
    """
    entries = spent(folder)
    return {
        "seconds": round(sum(entry["seconds"] for entry in entries), 3),
        "tokens": sum(entry["tokens"] for entry in entries),
        "peak_memory_bytes": max((e.get("peak_memory_bytes", 0) for e in entries), default=0),
        "packs_measured": len(entries),
    }


def _engine(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the packs were measured on, and what the model had to say; unlike values as a list."""
    last = {entry["pack"]: entry for entry in spent(folder)}
    engine: dict[str, list] = {}
    notes: dict[str, None] = {}
    for _, entry in sorted(last.items()):
        for key, value in entry.get("engine", {}).items():
            known = engine.setdefault(key, [])
            known += [] if value in known else [value]
        notes |= dict.fromkeys(entry.get("notes", []))
    return {k: v[0] if len(v) == 1 else v for k, v in engine.items()}, list(notes)


def _execute(plan: Plan, loaded: Loaded, records: dict) -> dict[tuple[str, int], list[str]]:
    from harness.execution import execute

    programs = [records[item.key] | {"doc": item.doc} for item in loaded.items]
    with bar(f"{loaded.suite.name} · executing programs", len(programs)) as progress:
        workers = plan.recipe.machine.workers
        found = execute(programs, allow=True, workers=workers, progress=progress)
    return {item.key: outcome for item, outcome in zip(loaded.items, found, strict=True)}


def _manifest(
    plan: Plan, step: Step, loaded: Loaded, frame: pd.DataFrame, records: Records
) -> dict[str, Any]:
    from importlib.metadata import version

    recipe, row = plan.recipe, step.rows[0]
    definition = definition_hash(step.name)
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
    engine, notes = _engine(step.folder)
    return {
        "kind": "evaluation",
        "row": row,
        "suite": step.name,
        "rule": loaded.suite.rule,
        "model_identity": plan.identities[row],
        "identity": step.identity,
        "content": step.content,
        "protocol": loaded.protocol,
        "data": loaded.hashes,
        "seed": recipe.seed,
        "limit": recipe.limit(step.name),
        "heldout": recipe.corpus.heldout if "heldout" in step.content and recipe.corpus else None,
        "questions": recipe.evaluate.data,
        "partial": len(loaded.items) < sum(loaded.totals.values()),
        "dtype": recipe.evaluate.dtype,
        "lm_eval": version("lm-eval"),
        "mixing": _mixing(recipe, row),
        "tasks": listed,
        "health": _health(loaded, frame, records),
        "engine": engine,
        "notes": notes,
        "cost": _cost(step.folder),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _mixing(recipe: Recipe, row: str) -> str | None:
    """What an ensemble mixes, and at which level; None for one model."""
    variant = recipe.variants.get(row)
    if variant is None or variant.ensemble is None:
        return None
    return str(mixing(variant.ensemble.rule, variant.ensemble.level))


def rescore(plan: Plan, step: Step, loaded: Loaded) -> None:
    """Compute every metric of a finished run again from its records."""
    if read_manifest(step.folder) is None:
        raise RunError(f"{step.folder}: not measured yet; evaluate the row first")
    score(plan, step, loaded)
