"""From records to scores: lm-eval's filters and metrics, without a model.

What is computed here can be computed again from the same records, and comes to the same bytes.
Programs are executed in the sandbox at this stage, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fusion.errors import RunError
from harness.answering import packs
from harness.costs import written
from harness.evaluate import Item, Loaded, metric_name
from harness.hashing import definition_hash
from harness.judges import reached
from harness.judging import judge, judge_key, sentence
from harness.locks import require
from harness.plan import Plan, Step
from harness.progress import bar
from harness.recipe import Recipe
from harness.rules import mixing
from harness.samples import SCORES, read, seals, spent
from harness.store import beside, finish, identity, read_manifest, world
from reports.corpus import CORPUS_METRICS
from reports.records import TOKEN_METRIC
from tasks.suite import Task

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
    outcomes, sandbox = _execute(plan, loaded, records)
    judged, judge = _judge(plan, loaded, records)
    rows = [
        row
        for item in loaded.items
        for row in _scores(
            loaded, item, records[item.key], outcomes.get(item.key), judged.get(item.key)
        )
    ]
    frame = pd.DataFrame(rows, columns=SCORE_COLUMNS)
    if frame["counts"].isna().all():  # no metric of a corpus
        frame = frame.drop(columns="counts")
    frame = frame.astype({"value": "float64", "weight": "float64", "doc_id": "int64"})
    require(plan.home, folder.name)
    path = folder / SCORES
    partial = beside(path)
    try:
        frame.to_parquet(partial, index=False)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise world(error, path) from error
    manifest = _manifest(plan, step, loaded, frame, records)
    if sandbox:
        manifest |= {"sandbox": sandbox, "programs": _programs(records, outcomes)}
    if judge:
        manifest["judge"] = judge
        manifest["notes"] = [*manifest["notes"], sentence(judge)]
        manifest["health"] |= {key: judge[key] for key in ("unparsed", "order")}
    finish(folder, manifest)


SCORE_COLUMNS = ["task", "doc_id", "cluster", "metric", "value", "weight", "outcome", "extracted"]
SCORE_COLUMNS += ["counts"]  # of a metric that is no mean over items: `reports.corpus`


def _responses(record: dict, number: int, requests: int) -> list[Any]:
    """What lm-eval keeps of a request: a list of its answers, several where it was repeated."""
    if record["output_type"] == "generate_until":
        times = len(record["generation"]) // requests
        return record["generation"][number * times : (number + 1) * times]
    if record["output_type"] == "loglikelihood_rolling":
        return [record["choice_ll"][number]]
    return [(record["choice_ll"][number], record["choice_greedy"][number])]


def _scores(
    loaded: Loaded, item: Item, record: dict, executed: Any, judged: Any = None
) -> Iterator[dict[str, Any]]:
    """One row for each metric that lm-eval, a judge or the programs' outcomes give an item."""
    task = next(t for t in loaded.suite.tasks if t.name == item.task)
    base = {"task": item.task, "doc_id": item.doc_id, "cluster": record["cluster"]}
    if judged is not None:
        yield from (base | row for row in judged)
        return
    if executed is not None:
        from harness.execution import passes, summarise

        value, outcome, outcomes = summarise(executed)
        said = {"weight": 1.0, "outcome": outcome, "extracted": outcomes}
        for metric, share in {task.metric: value, **passes(executed)}.items():
            yield base | said | {"metric": metric, "value": share}
        return
    object_ = loaded.tasks[item.task]
    for filter_name in item.requests[0].filtered_resps:
        if task.filter not in ("none", filter_name) and len(item.requests[0].filtered_resps) > 1:
            continue
        answers = [request.filtered_resps[filter_name] for request in item.requests]
        extracted = answers[0] if isinstance(answers[0], str) else None
        outcome = _outcome(loaded, item, record, answers)
        for said_as, value in object_.process_results(item.doc, answers).items():
            metric = metric_name(object_, said_as)
            weight, counts = 1.0, None
            if metric == "bits_per_byte":
                total, weight = value
                value = -total / (weight * math.log(2))
            elif metric in CORPUS_METRICS and isinstance(value, (list, tuple)) and _single(value):
                reference, said = value
                counts, value = CORPUS_METRICS[metric].of_item(said, reference)
            elif isinstance(value, list) and value and all(isinstance(v, bool) for v in value):
                weight, value = len(value), sum(value) / len(value)  # of an item's several checks
            if not isinstance(value, (int, float, np.number, bool)):
                continue
            found = {"metric": metric, "value": float(value), "weight": float(weight)}
            found |= {"counts": counts}
            yield base | found | {"outcome": outcome, "extracted": extracted}
    tokens = record["text_tokens"]
    if tokens and record["output_type"] == "loglikelihood_rolling":
        nats = {"metric": TOKEN_METRIC, "value": -record["choice_ll"][0] / tokens}
        yield base | nats | {"weight": float(tokens), "outcome": "ok", "extracted": None}


def _single(value: Sequence[Any]) -> bool:
    """Whether a corpus metric's pair names one reference, not several."""
    return isinstance(value[0], str)


def _outcome(loaded: Loaded, item: Item, record: dict, answers: list) -> str:
    """What is to be known about an item beside its score; the first that applies."""
    if _cut(loaded, item, record):
        return "truncated"
    if _unextracted(record, answers):
        return "unextracted"
    return "tie" if _tied(loaded, item, record) else "ok"


def _cut(loaded: Loaded, item: Item, record: dict) -> bool:
    """Whether a generation ended at the token limit, unless that is how the task ends answers."""
    ends = (loaded.tasks[item.task].config.metadata or {}).get("ends")
    return "length" in record["finish_reason"] and ends != "length"


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


def _health(
    loaded: Loaded, frame: pd.DataFrame, records: Records, tasks: Sequence[Task]
) -> dict[str, int]:
    """How many items were cut at the token limit, gave no answer, were tied, were not judged.

    An item may count more than once; what was cut counts though an answer was found in it.
    """
    metrics = {task.name: task.metric for task in tasks}
    primary = frame[frame.metric == frame.task.map(metrics)]
    items = [item for item in loaded.items if item.task in metrics]
    silent = 0
    for item in items:
        task = next(t for t in tasks if t.name == item.task)
        found = item.requests[0].filtered_resps
        name = task.filter if task.filter in found else next(iter(found))
        silent += _unextracted(records[item.key], [r.filtered_resps[name] for r in item.requests])
    return {
        "truncated": sum(_cut(loaded, item, records[item.key]) for item in items),
        "unextracted": silent,
        "tie": sum(_tied(loaded, item, records[item.key]) for item in items),
        "infra": int((primary.outcome == "infra").sum()),
    }


def _programs(records: Records, outcomes: dict[tuple[str, int], list[str]]) -> dict[str, int]:
    """How many programs there were, how many ended how, and how many were cut at the token limit.

    What was cut counts by its ending, too.
    """
    from harness.execution import OUTCOMES

    found = [outcome for some in outcomes.values() for outcome in some]
    cut = sum(record["finish_reason"].count("length") for record in records.values())
    counts = {word: found.count(word) for word in OUTCOMES}
    return {"programs": len(found), **counts, "truncated": cut}


def _cost(folder: Path) -> dict[str, Any]:
    """What measuring took, all interrupted runs and all processes together, from the ledger.

    seconds: in packs only; loading models, and packs that an interruption cut, are not known.
    """
    entries = spent(folder)
    peaks = ("peak_memory_bytes", "peak_gpu_memory_bytes")
    return {
        **{key: _sum(entries, key) for key in ("seconds", "cpu_seconds", "gpu_seconds")},
        "tokens": sum(entry["tokens"] for entry in entries),
        "flops": _sum(entries, "flops"),
        "flops_per_token": next((e.get("flops_per_token") for e in reversed(entries)), None),
        "bytes": written(folder),
        **{p: max(e[p] for e in entries if p in e) for p in peaks if any(p in e for e in entries)},
        "packs_measured": len(entries),
    }


def _sum(entries: list[dict[str, Any]], key: str) -> Any:
    """The sum, or None if a pack does not know it."""
    found = [entry.get(key) for entry in entries]
    known = [value for value in found if value is not None]
    return round(sum(known), 3) if len(known) == len(found) else None


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


def _execute(
    plan: Plan, loaded: Loaded, records: Records
) -> tuple[dict[tuple[str, int], list[str]], dict[str, Any]]:
    """The outcomes of an item's programs, and where they ran: tier, image, versions by language."""
    if not loaded.suite.executes_code:
        return {}, {}
    from harness.execution import execute, toolchains
    from harness.sandbox import choose

    tier = choose(plan.recipe.evaluate.sandbox)
    programs = [records[item.key] | {"doc": item.doc} for item in loaded.items]
    total = sum(len(program["generation"]) for program in programs)
    with bar(f"{loaded.suite.name} · executing programs", total) as progress:
        workers = plan.recipe.machine.workers
        found = execute(programs, allow=True, workers=workers, tier=tier, progress=progress)
    where = {"tier": tier.name, "reason": tier.reason}
    where |= {"image": tier.image, "image_id": tier.image_id} if tier.image else {}
    versions = toolchains((item.doc for item in loaded.items), tier)
    named = {item.key: outcome for item, outcome in zip(loaded.items, found, strict=True)}
    return named, where | {"toolchains": versions}


def _judge(
    plan: Plan, loaded: Loaded, records: Records
) -> tuple[dict[tuple[str, int], list[dict[str, Any]]], dict[str, Any]]:
    """A judge's scores by item, and what is to be known of it; no scores where there is none."""
    kind, section = loaded.suite.judged, plan.recipe.evaluate.judge
    if not kind:
        return {}, {}
    if section is None:
        metric = "rating" if kind == "rating" else "lc_win_rate"
        nothing = {"metric": metric, "value": float("nan"), "weight": 1.0, "outcome": "no_judge"}
        return {i.key: [nothing | {"extracted": None, "counts": None}] for i in loaded.items}, {}
    asked = [(item.key, item.doc, records[item.key]["generation"]) for item in loaded.items]
    key, label = judge_key(plan), f"{loaded.suite.name} · verdicts of {section.model}"
    assert key
    found = judge(kind, section, key, asked, reached(plan, section), plan.home, label)
    return found.rows, found.facts


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
        protocol |= {"judge": judge_key(plan)} if loaded.suite.judged else {}
        own: dict[str, Any] = {}
        if task.metric in CORPUS_METRICS:
            own["arithmetic"] = CORPUS_METRICS[task.metric].signature()
            protocol |= own
        if loaded.suite.rule == "apart":
            own["health"] = _health(loaded, frame, records, [task])
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
                **own,
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
        "health": _health(loaded, frame, records, loaded.suite.tasks),
        "engine": engine,
        "notes": notes,
        "cost": _cost(step.folder),
        "seals": seals(step.folder),
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
