"""The whole loop as one function: recipe → plan → build → evaluate → report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.errors import RecipeError, RunError
from harness import mirror
from harness.hosts import calling, refuse_objects
from harness.machine import device
from harness.plan import Plan, Step, inputs, plan, suite_of
from harness.progress import say
from harness.recipe import Loaded, load
from harness.store import home, made_home, read_manifest

if TYPE_CHECKING:
    from reports.cells import Report

ALL = ("build", "evaluate", "report")


def run(
    reference: str,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    stages: Sequence[str] = ALL,
    dry_run: bool = False,
    executor: str = "local",
    address: str | None = None,
) -> int:
    """Carry out a recipe's stages; the exit code. RecipeError, RunError as they come.

    executor: local, or ray, whose cluster has an address.
    """
    started = time.monotonic()
    loaded = load(reference, overrides)
    _check(loaded, executor, address)
    rows = _rows(loaded, only)
    refuse_objects(loaded)
    planned = plan(loaded.recipe, home() if dry_run else made_home())
    reopen(planned, rows, stages, dry_run)
    if dry_run:
        print(overview(planned, rows, stages))
        return 0
    reasons: dict[str, str] = {}
    waiting = pending(planned, rows, stages)
    if waiting:
        _check_scorers(waiting)
    if waiting and executor == "local":
        _warn_of_slow_arithmetic(planned)
    if waiting and executor == "ray":
        planned, reasons = _elsewhere(loaded, planned, rows, stages, address)
    elif "build" in stages and any(step.kind != "evaluate" for step in waiting):
        with calling(planned, loaded.name):
            planned, reasons = _build(loaded, planned, rows)
    if "evaluate" in stages:
        reasons |= _evaluate(planned, rows, reasons) if executor == "local" else {}
        reasons |= _keep(planned, rows)
    code = 1 if reasons else 0
    if "report" in stages:
        from harness.report import write

        show(*write(planned, loaded, reasons))
        if not waiting and stages == ALL:
            seconds = time.monotonic() - started
            say(f"nothing to do: all is built and measured ({seconds:.1f} s)")
    for name, reason in reasons.items():
        say(f"{name}: {reason}")
    return code


def _check_scorers(waiting: Sequence[Step]) -> None:
    """RunError, before anything is built, if a scorer of what is to be measured lacks a module."""
    from harness.stock_tasks import check

    suites = [suite_of(name) for name in {s.name: 0 for s in waiting if s.kind == "evaluate"}]
    check([suite for suite in suites if suite])


def _warn_of_slow_arithmetic(planned: Plan) -> None:
    """A recipe in bfloat16 on a processor without it would take days in place of hours."""
    recipe = planned.recipe
    trained = [v.train.dtype for v in recipe.variants.values() if v.train]
    if "bfloat16" not in (recipe.evaluate.dtype, *trained):
        return
    from fusion.rates import bfloat16_slowdown

    if device(planned).startswith("cpu") and (times := bfloat16_slowdown()) > 3:
        say(
            f"this processor computes in bfloat16 {times:.0f} times as slowly as in float32: leave "
            "`dtype: bfloat16` out of the recipe"
        )


def _rows(loaded: Loaded, only: Sequence[str]) -> list[str]:
    rows = loaded.recipe.rows
    unknown = [name for name in only if name not in rows]
    if unknown:
        raise RecipeError(
            f"--only {unknown[0]}: no such row in {loaded.name}; rows: {', '.join(rows)}"
        )
    return [row for row in rows if row in only] if only else rows


def asked(planned: Plan, loaded: Loaded, only: Sequence[str] = ()) -> list[Step]:
    """All steps that a run of these rows consists of, done or not, in its order."""
    from harness.build import needed

    rows = _rows(loaded, only)
    wanted = needed(planned, rows)
    builds = [step for step in planned.builds() if step.identity in wanted]
    allowed = planned.recipe.evaluate.allow_code_execution
    measured = {
        step.identity: step
        for row in rows
        for step in planned.evaluations(row)
        if _may_run(step, allowed)
    }
    return [*builds, *measured.values()]


def pending(planned: Plan, rows: Sequence[str], stages: Sequence[str]) -> list[Step]:
    """The steps of these rows that are not done and that these stages may do."""
    from harness.build import needed

    wanted = needed(planned, rows)
    recipe = planned.recipe
    builds = [s for s in planned.builds() if s.identity in wanted and not s.done]
    evaluations = {
        step.identity: step
        for row in rows
        for step in planned.evaluations(row)
        if not step.done and _may_run(step, recipe.evaluate.allow_code_execution)
    }
    measured = evaluations.values() if "evaluate" in stages else []
    return [*(builds if "build" in stages else []), *measured]


def reopen(planned: Plan, rows: Sequence[str], stages: Sequence[str], dry_run: bool) -> None:
    """Take back the manifests of finished measurements whose files are damaged, and say so.

    What is whole is kept: the measurement goes on, and only what is damaged is done again. Stages
    that do not evaluate, and a dry run, only say it.
    """
    from harness.samples import SCORES, damage

    allowed = planned.recipe.evaluate.allow_code_execution
    mends = "evaluate" in stages
    for row in rows:
        for step in planned.evaluations(row):
            manifest = read_manifest(step.folder)
            if manifest is None or not _may_run(step, allowed):
                continue
            mirror.bring(step.folder)
            found = damage(step.folder, manifest)
            for name, what in found.items():
                derived = name in (SCORES, "manifest.json")
                again = "scores are derived" if derived else "its items are measured"
                again = f"{again} again" if mends else "`kfuse run` mends it"
                say(f"{step.folder / name}: {what}; {again}")
            if found and mends and not dry_run:
                mirror.remove(step.folder / "manifest.json")


def _may_run(step: Step, allowed: bool) -> bool:
    known = suite_of(step.name)
    return allowed or known is None or not known.executes_code


def _check(loaded: Loaded, executor: str, address: str | None) -> None:
    """RecipeError or RunError, before any work, if nothing can be carried out so."""
    if executor not in ("local", "ray"):
        raise RecipeError(
            f"--executor {executor}: unknown; local (this machine) or ray (a cluster)"
        )
    if address and executor != "ray":
        raise RecipeError(f"--address {address}: belongs to --executor ray")
    if executor == "ray":
        from harness.remote import require

        hosts = loaded.recipe.machine.hosts
        if hosts > 1:
            raise RecipeError(
                f"machine.hosts: is {hosts}, but with --executor ray a training is a task of one "
                "node; leave it out, and give `processes` the GPUs of a node"
            )
        require()


def _build(loaded: Loaded, planned: Plan, rows: Sequence[str]) -> tuple[Plan, dict[str, str]]:
    """Build, hub models first."""
    from harness.build import build

    planned, reasons = _fetch(loaded, planned, rows)
    return planned, reasons | build(planned, rows)


def _fetch(loaded: Loaded, planned: Plan, rows: Sequence[str]) -> tuple[Plan, dict[str, str]]:
    """Fetch hub models: their content names what follows, once they are here.

    RunError, before anything is computed, if a package is missing that training needs.
    """
    from harness.build import build, needed

    wanted = needed(planned, rows)
    if any("lora" in s.content for s in planned.builds() if s.identity in wanted and not s.done):
        from fusion.lora import require

        require()  # now, and not after hours of other rows
    hub = [
        name
        for name in planned.recipe.sources
        if planned.identities[name] in wanted
        if (folder := planned.folders[name]) and "absent" in folder.parts
    ]
    reasons: dict[str, str] = {}
    if hub:
        reasons = build(planned, hub)
        planned = plan(loaded.recipe, planned.home)
    return planned, reasons


def _elsewhere(
    loaded: Loaded,
    planned: Plan,
    rows: Sequence[str],
    stages: Sequence[str],
    address: str | None,
) -> tuple[Plan, dict[str, str]]:
    """Build and measure on a Ray cluster; reasons as for both."""
    from harness.remote import carry_out, cluster, wanted

    reasons: dict[str, str] = {}
    with cluster(address) as ray:
        if "build" in stages:
            planned, reasons = _fetch(loaded, planned, rows)
        steps = wanted(planned, rows) if "build" in stages else []
        todo = _todo(planned, rows, reasons) if "evaluate" in stages else {}
        return planned, reasons | carry_out(ray, planned, rows, steps, todo)


def _evaluate(planned: Plan, rows: Sequence[str], reasons: dict[str, str]) -> dict[str, str]:
    """Measure what is built; reasons by "row/suite" for what could not be."""
    todo = _todo(planned, rows, reasons)
    if not todo:
        return {}
    from harness.measuring import measure_rows

    return measure_rows(planned, todo)


def _todo(planned: Plan, rows: Sequence[str], reasons: dict[str, str]) -> dict[str, list[Step]]:
    """What is to be measured, by row, of the rows that have no reason not to be."""
    todo: dict[str, list[Step]] = {}
    taken: set[str] = set()  # rows that are the same model are measured once
    for row in rows:
        if row not in reasons and planned.identities[row] not in taken:
            taken.add(planned.identities[row])
            if steps := pending(planned, [row], ("evaluate",)):
                todo[row] = steps
    return todo


def _keep(planned: Plan, rows: Sequence[str]) -> dict[str, str]:
    """Compress what is to be kept so, once nothing needs it; reasons by "row/keep" for failures."""
    variants = planned.recipe.variants
    done = []
    for row in rows:
        if row in variants and variants[row].keep:
            twins = planned.twins(row)
            if not all(twin in variants and variants[twin].keep for twin in twins):
                say(f"{row}: stays whole; {', '.join(twins)} are one model and not all say keep")
                continue
            users = [n for n in variants if not set(twins).isdisjoint(inputs(planned.recipe, n))]
            if not pending(planned, [row, *users], ("build", "evaluate")):
                done += [twins[0]] if twins[0] not in done else []
    if not done:
        return {}
    from harness.keeping import keep_rows

    return {f"{row}/keep": reason for row, reason in keep_rows(planned, done).items()}


def rescore(reference: str, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> int:
    """Derive the scores of all finished measurements from their records again; the exit code."""
    from harness.measuring import Measuring

    loaded = load(reference, overrides)
    rows = _rows(loaded, only)
    planned = plan(loaded.recipe, home())
    measuring, code, count = Measuring(planned), 0, 0
    steps = {step.identity: step for row in rows for step in planned.evaluations(row)}
    for step in steps.values():
        if not step.done or not _may_run(step, loaded.recipe.evaluate.allow_code_execution):
            continue
        try:
            measuring.rescore(step)
            count += 1
        except RunError as error:
            say(f"{step.rows[0]}/{step.name}: {error}")
            code = 1
    if not count and not code:
        raise RunError(f"{loaded.name}: nothing is measured yet; `kfuse evaluate` measures")
    say(f"scores of {count} measurements derived again from their records")
    return code


def foresee(
    reference: str,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    gpu: str | None = None,
) -> str:
    """What a recipe still takes and what it can show. RunError if it cannot fit here.

    gpu: reckon with GPUs of this kind instead of this machine; RecipeError if it is unknown.
    """
    from fusion.rates import GPUS
    from harness.forecast import forecast
    from harness.forecast_table import table

    if gpu is not None and gpu not in GPUS:
        raise RecipeError(f"--gpu {gpu}: no data sheet; known: {', '.join(GPUS)}")
    loaded = load(reference, overrides)
    planned = plan(loaded.recipe, home())
    waiting = pending(planned, _rows(loaded, only), ALL)
    if not waiting:
        return f"{loaded.name}: all is built and measured; nothing is left to be done"
    found = forecast(planned, waiting, gpu)
    if found.refusals:
        raise RunError("\n".join([table(found), "cannot fit:", *found.refusals]))
    return table(found)


def overview(planned: Plan, rows: Sequence[str], stages: Sequence[str]) -> str:
    """Rows × stages as a table: exists, will be built, will be measured; tokens and disk."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What would be done", title_justify="left")
    for column in ("row", "what", "model", *planned.recipe.evaluate.suites):
        table.add_column(column)
    allowed = planned.recipe.evaluate.allow_code_execution
    for row in rows:
        cells = []
        for step in planned.evaluations(row):
            limit = planned.recipe.limit(step.name)
            state = "exists" if step.done else "will go on" if step.started else "will be measured"
            if not step.done and not _may_run(step, allowed):
                state = "not measured: code execution is not allowed"
            cells.append(state + (f", {limit} questions" if limit and not step.done else ""))
        table.add_row(row, planned.summaries[row], _model_state(planned, row), *cells)
    width = max(120, 40 + 24 * len(planned.recipe.evaluate.suites))
    console = Console(width=width, markup=False, emoji=False)  # names hold brackets
    with console.capture() as captured:
        console.print(table)
    waiting = [s for s in pending(planned, rows, stages) if s.kind != "evaluate"]
    tokens = {k: sum(s.tokens for s in waiting if s.kind == k) for k in ("capture", "train")}
    disk = sum(s.disk for s in waiting) / 2**30
    far = sum(s.kind == "fetch" and "absent" in s.folder.parts for s in waiting)
    unknown = f" and {far} models of the hub" if far else ""
    lines = [f"  {s.kind:<10} {s.name:<28} {s.folder.name}" for s in waiting]
    return "\n".join(
        [
            captured.get().rstrip(),
            f"to build: {len(waiting)} folders, about {disk:.1f} GiB{unknown}; "
            f"{tokens['capture']:,} tokens "
            f"of source distributions, {tokens['train']:,} tokens of training",
            *lines,
            f"store: {planned.home}",
        ]
    )


def _model_state(planned: Plan, row: str) -> str:
    step = planned.steps.get(planned.identities[row])
    if planned.folders[row] is None:
        return "nothing to build"
    if step is None or step.done:
        return "exists"
    if step.started:
        return "will go on"
    return "will be fetched" if step.kind == "fetch" else "will be built"


def show(report: Report, files: dict[str, Path]) -> None:
    """Print a report's table, and where its files are."""
    from rich.console import Console

    from reports.formats import terminal

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    console.print(terminal(report))
    for kind, path in files.items():
        print(f"{kind:<9} {path}")
