"""Put together what a report needs, from finished folders, and let the reports room write it."""

from __future__ import annotations

import platform
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fusion.spec import Variant
from harness import mirror
from harness.build import needed
from harness.contamination import contamination
from harness.keeping import told
from harness.plan import Plan, Step, suite_of
from harness.prompts import prompts
from harness.recipe import Loaded, Recipe
from harness.steps import root
from harness.store import identity, provenance, read_manifest, write_json
from tasks.published import DOMAINS, PUBLISHED, Published

if TYPE_CHECKING:
    from reports.cells import Report


def write(plan: Plan, loaded: Loaded, reasons: dict[str, str]) -> tuple[Report, dict[str, Path]]:
    """Write index.json and the report beside it; the report and its files by format.

    reasons: why a row could not be built, or a row's suite ("row/suite") not be measured.
    """
    from reports.report import save
    from reports.table import read

    recipe = plan.recipe
    key = identity({"steps": list(plan.steps), "reference": recipe.reference})
    folder = plan.home / "reports" / f"{loaded.name}-{key[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    runs = {(row, s.name): s for row in recipe.rows for s in plan.evaluations(row)}
    cells: dict[str, dict[str, Any]] = {}
    for row in recipe.rows:
        cells[row] = {}
        for suite in recipe.evaluate.suites:
            cells[row][suite] = _cell(plan, row, runs[row, suite], reasons)
    stages = _stages(plan)
    index = {
        "recipe": loaded.name,
        "recipe_yaml": loaded.text,
        "overrides": list(loaded.overrides),
        "reference": recipe.reference,
        "seed": recipe.seed,
        "rows": [_row(plan, row) | {"stages": stages[row]} for row in recipe.rows],
        "suites": [
            _suite(plan, name, runs) | {"margin": recipe.margin(name)}
            for name in recipe.evaluate.suites
        ],
        "cells": cells,
        "published": _published(plan),
        "extra": _extra(plan, loaded, list(runs.values())),
        "domains": _domains(plan),
        "facts": {
            "machine": machine(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": sum(_cost(step.folder).get("seconds", 0) for step in plan.steps.values()),
            **provenance(),
        },
    }
    path = folder / "index.json"
    write_json(path, index)
    report = read(path)
    files = save(report, folder)
    mirror.send(folder)
    return report, files


def _extra(plan: Plan, loaded: Loaded, runs: list[Step]) -> dict[str, Any]:
    """What panels show beside scores; each part only if there is something to it."""
    by_suite = {
        suite: prompts(plan, [step for step in runs if step.name == suite])
        for suite in plan.recipe.evaluate.suites
    }
    return {
        "seed": plan.recipe.seed,
        "resolved": yaml.safe_dump(plan.recipe.model_dump(mode="json"), sort_keys=False),
        "prompts": {
            suite: {protocol: _relative(plan, path) for protocol, path in files.items()}
            for suite, files in by_suite.items()
        },
        "contamination": contamination(plan, by_suite),
    }


def _published(plan: Plan) -> list[dict[str, Any]]:
    """What papers printed for this recipe's rows: its sources, by hub id, and their own rows.

    A trained or merged row is the paper's if it is named so, begins as the paper's target and the
    recipe has all of the paper's sources; a matrix over merge methods has one printed row.
    """
    out = []
    for row in plan.recipe.rows:
        for suite in plan.recipe.evaluate.suites:
            for table in PUBLISHED.get(suite, ()):
                values = table.of(_model(plan.recipe, row, table))
                if values:
                    out.append({"row": row, "suite": suite} | _entry(suite, table, values))
                if values and row in plan.recipe.variants:
                    again = "made anew: seeds move it, and it is no calibration"
                    out[-1]["unlike"] = table.unlike or again
    return out


def _model(recipe: Recipe, row: str, table: Published) -> str:
    """The model of a table that a row is; its own name, which no table has, if it is none."""
    paths = {name: source.path for name, source in recipe.sources.items()}
    if row in paths:
        return paths[row]
    variant = recipe.variants[row]
    ours = (variant.train or variant.merge) and set(table.sources) <= set(paths.values())
    if not ours or paths.get(root(recipe, row)) != table.sources[0]:
        return ""
    return row.partition("[")[0] if variant.merge else row


def _entry(suite: str, table: Published, values: dict[str, float]) -> dict[str, Any]:
    """A table's part of an index: values, and what of a measurement stands beside each."""
    known = suite_of(suite)
    tasks = list(table.tasks) or [task.name for task in (known.tasks if known else ())]
    averages = {name: tasks for name in table.averages}
    for name in list(averages)[1:]:
        averages[name] = [task for task in tasks if task not in table.without]
    return {
        "paper": table.paper,
        "table": table.table,
        "values": values,
        "averages": averages,
        "metrics": list(table.metrics),
        "items": table.items,
        "decimals": table.decimals,
        "unlike": table.unlike,
    }


def _domains(plan: Plan) -> dict[str, Any] | None:
    """The paper's table of domains, where the recipe measures what stands in for them."""
    if "bits_per_byte@fusellm" not in plan.recipe.evaluate.suites:
        return None
    return {key: getattr(DOMAINS, key) for key in ("source", "columns", "rows", "unlike")}


def _cost(folder: Path) -> dict[str, Any]:
    return (read_manifest(folder) or {}).get("cost", {})


def _cell(plan: Plan, row: str, step: Step, reasons: dict[str, str]) -> dict[str, str]:
    if step.done:
        wrong = _unreadable(step.folder)
        if wrong:
            return {"reason": f"not measured: {wrong}"}
        return {"run": str(step.folder.relative_to(plan.home))}
    known = suite_of(step.name)
    if known and known.executes_code and not plan.recipe.evaluate.allow_code_execution:
        return {
            "reason": "not measured: generated code is only executed if the recipe says "
            "evaluate.allow_code_execution: true"
        }
    if row in reasons:
        return {"reason": f"not built: {reasons[row]}"}
    reason = reasons.get(f"{row}/{step.name}") or step.failure
    return {"reason": reason or "not measured: not run yet"}


def _unreadable(folder: Path) -> str | None:
    """Why a finished measurement has no scores that can be read, so that the others are shown."""
    from reports.records import Run, read_primary

    try:
        read_primary(Run.open(folder))
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return None


def _row(plan: Plan, row: str) -> dict[str, Any]:
    folder = plan.folders[row]
    variant = plan.recipe.variants.get(row)
    kind = "source"
    if variant:
        kind = next(k for k in ("train", "merge", "ensemble", "repeat") if getattr(variant, k))
    log = folder / "training.csv" if folder else None
    if log and kind == "train":
        mirror.bring(log)
    facts = (read_manifest(folder) or {}).get("facts", {}) if folder else {}
    captures = [
        {"name": step.name, "cost": _cost(step.folder)}
        for step in plan.steps.values()
        if step.kind == "capture" and row in step.rows
    ]
    kept = (read_manifest(folder) or {}).get("kept") if folder else None
    return {
        "name": row,
        "kind": kind,
        "summary": plan.summaries[row] + (f"; {told(kept)}" if kept else ""),
        "identity": plan.identities[row],
        "trained": _trained(plan, row),
        "folder": _relative(plan, folder),
        "cost": _cost(folder) if folder else None,
        "training_log": _relative(plan, log) if log and log.exists() else None,
        "captures": captures,
        "sources": _drawn_on(variant),
        "target": _target(plan, row),
        "won": facts.get("won"),
        "kept": kept,
    }


def _stages(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """The finished folders that each row stands on, the rows it was made from with theirs, and what
    they cost.
    """
    standing = {row: needed(plan, [row]) for row in plan.recipe.rows}
    shared = Counter(key for keys in standing.values() for key in keys)
    done = [step for step in plan.builds() if step.done]
    return {
        row: [
            {
                "stage": step.kind,
                "name": step.name,
                "shared_by": shared[step.identity],
                "cost": _cost(step.folder),
            }
            for step in done
            if step.identity in keys
        ]
        for row, keys in standing.items()
    }


def _drawn_on(variant: Variant | None) -> list[str]:
    """The rows that a fusion, a merge or an ensemble combines."""
    if variant is None:
        return []
    if variant.train:
        return list(variant.train.fuse.sources) if variant.train.fuse else []
    if variant.merge:
        return list(variant.merge.inputs)
    return list(variant.ensemble.members) if variant.ensemble else []


def _target(plan: Plan, row: str) -> str | None:
    """The given LLM whose weights a row began as; an ensemble has none."""
    begun = root(plan.recipe, row)
    return begun if begun in plan.recipe.sources else None


def _trained(plan: Plan, row: str) -> str | None:
    """What a trained row's seeds have in common: a hash of its training but for the seed.

    None for a row that is another one again: the same model twice is no second seed.
    """
    variant = plan.recipe.variants.get(row)
    if variant is None or variant.train is None or plan.twins(row)[0] != row:
        return None
    content = plan.steps[plan.identities[row]].content
    return identity({k: v for k, v in content.items() if k not in ("seed", "order")})[:12]


def _relative(plan: Plan, path: Path | None) -> str | None:
    if path is None:
        return None
    return str(path.relative_to(plan.home)) if path.is_relative_to(plan.home) else path.name


def _suite(plan: Plan, name: str, runs: dict[tuple[str, str], Step]) -> dict[str, Any]:
    """A suite as its first finished run knows it, else as its file says."""
    for row in plan.recipe.rows:
        step = runs[row, name]
        manifest = read_manifest(step.folder)
        if manifest and not _unreadable(step.folder):
            listed = manifest["tasks"]
            found = {"rule": manifest["rule"], "tasks": listed, "without": _without(name)}
            return {"name": name, "title": _title(name)} | found
    known = suite_of(name)
    tasks = known.tasks if known else ()
    listed = [
        {"task": t.name, "title": t.title, "metric": t.metric}
        | {"higher_is_better": t.higher_is_better}
        for t in tasks
    ]
    rule = known.rule if known else "macro"
    found = {"rule": rule, "tasks": listed, "without": _without(name)}
    return {"name": name, "title": _title(name)} | found


def _without(name: str) -> list[str]:
    """Tasks that a suite's second average leaves out."""
    known = suite_of(name)
    return list(known.without) if known else []


def _title(name: str) -> str:
    known = suite_of(name)
    return known.title if known else name


def machine() -> str:
    """This machine in one line."""
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} cores, {memory:.0f} GiB"
