"""Put together what a report needs, from finished folders, and let the reports room write it."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

from harness.keeping import told
from harness.plan import Plan, Step, suite_of
from harness.recipe import Loaded
from harness.store import identity, provenance, read_manifest, write_json
from tasks.published import LLAMA2, PUBLISHED


def write(plan: Plan, loaded: Loaded, reasons: dict[str, str]) -> tuple[Path, dict[str, Path]]:
    """Write index.json and the report beside it; the index and the files by format.

    reasons: why a row could not be built, or a row's suite ("row/suite") not be measured.
    """
    from reports.report import write as render

    recipe = plan.recipe
    key = identity({"steps": list(plan.steps), "reference": recipe.reference})
    folder = plan.home / "reports" / f"{loaded.name}-{key[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    runs = {(s.rows[0], s.name): s for row in recipe.rows for s in plan.evaluations(row)}
    cells: dict[str, dict[str, Any]] = {}
    for row in recipe.rows:
        cells[row] = {}
        for suite in recipe.evaluate.suites:
            cells[row][suite] = _cell(plan, row, runs[row, suite], reasons)
    index = {
        "recipe": loaded.name,
        "recipe_yaml": loaded.text,
        "overrides": list(loaded.overrides),
        "reference": recipe.reference,
        "seed": recipe.seed,
        "rows": [_row(plan, row) for row in recipe.rows],
        "suites": [_suite(plan, name, runs) for name in recipe.evaluate.suites],
        "cells": cells,
        "published": _published(plan),
        "facts": {
            "machine": machine(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": sum(_cost(step.folder).get("seconds", 0) for step in plan.steps.values()),
            **provenance(),
        },
    }
    path = folder / "index.json"
    write_json(path, index)
    return path, render(path)


def _published(plan: Plan) -> list[dict[str, Any]]:
    """What papers printed for this recipe's rows: its sources, by hub id, and their own rows.

    A trained row is the paper's if it is named so and starts from the paper's target.
    """
    out = []
    sources = {name: source.path for name, source in plan.recipe.sources.items()}
    for row in plan.recipe.rows:
        variant = plan.recipe.variants.get(row)
        trained = variant.train if variant else None
        model = sources.get(row)
        if trained and sources.get(trained.init) == LLAMA2:
            model = row
        for suite in plan.recipe.evaluate.suites:
            table = PUBLISHED.get(suite)
            values = table.of(model) if table and model else {}
            if not table or not values:
                continue
            averages = {name: list(table.tasks) for name in table.averages}
            for name in list(averages)[1:]:
                averages[name] = [task for task in table.tasks if task not in table.without]
            entry = {"row": row, "suite": suite, "paper": table.paper, "table": table.table}
            unlike = table.unlike or (
                "trained anew: seeds move it, and it is no calibration" if trained else ""
            )
            out.append(
                entry
                | {"values": values, "averages": averages, "items": table.items}
                | {"decimals": table.decimals, "unlike": unlike}
            )
    return out


def _cost(folder: Path) -> dict[str, Any]:
    return (read_manifest(folder) or {}).get("cost", {})


def _cell(plan: Plan, row: str, step: Step, reasons: dict[str, str]) -> dict[str, str]:
    if step.done:
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


def _row(plan: Plan, row: str) -> dict[str, Any]:
    folder = plan.folders[row]
    variant = plan.recipe.variants.get(row)
    kind = "source"
    if variant:
        kind = "train" if variant.train else "merge" if variant.merge else "ensemble"
    log = folder / "training.csv" if folder else None
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
        "folder": _relative(plan, folder),
        "cost": _cost(folder) if folder else None,
        "training_log": _relative(plan, log) if log and log.exists() else None,
        "captures": captures,
        "kept": kept,
    }


def _relative(plan: Plan, path: Path | None) -> str | None:
    if path is None:
        return None
    return str(path.relative_to(plan.home)) if path.is_relative_to(plan.home) else path.name


def _suite(plan: Plan, name: str, runs: dict[tuple[str, str], Step]) -> dict[str, Any]:
    """A suite as its first finished run knows it, else as its file says."""
    for row in plan.recipe.rows:
        manifest = read_manifest(runs[row, name].folder)
        if manifest:
            listed = manifest["tasks"]
            return {"name": name, "title": _title(name), "rule": manifest["rule"], "tasks": listed}
    known = suite_of(name)
    tasks = known.tasks if known else ()
    listed = [
        {"task": t.name, "metric": t.metric, "higher_is_better": t.higher_is_better} for t in tasks
    ]
    return {"name": name, "title": _title(name), "rule": "macro", "tasks": listed}


def _title(name: str) -> str:
    known = suite_of(name)
    return known.title if known else name


def machine() -> str:
    """This machine in one line."""
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} cores, {memory:.0f} GiB"
