"""`kfuse compare`, `gate`, `leaderboard` and `report RUNS`: finished runs in, an answer out.

What a user got wrong becomes one of the two errors here; the reports room itself knows neither.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import RecipeError, RunError
from harness import mirror
from harness.gate_file import load
from harness.report import machine
from harness.run import show
from harness.store import home, identity, made_home, provenance, url, write_json, write_text

if TYPE_CHECKING:
    from reports.lm_eval_results import Imported
    from reports.records import Run


@contextmanager
def _readable() -> Iterator[None]:
    """Files that cannot be read and runs that cannot be compared as a RunError."""
    from reports.compare import NotComparable

    try:
        yield
    except (NotComparable, OSError) as error:
        raise RunError(str(error)) from error


def _bring_rows(rows: Sequence[str], report: str | None) -> None:
    """Have here the reports that know rows, and the runs of these rows, of an object store."""
    if url() is None:
        return
    mirror.bring(home() / "reports", but=("*.html", "*.md", "*.csv"))
    for index in sorted((home() / "reports").glob("*/index.json")):
        if report and not index.parent.name.startswith(Path(report).name):
            continue
        cells = json.loads(index.read_text()).get("cells", {})
        for cell in [cell for row in rows for cell in cells.get(row, {}).values()]:
            if "run" in cell and set(rows) <= set(cells):
                mirror.bring(home() / cell["run"])


def _bring_runs(paths: Sequence[Path]) -> None:
    """Have here the folders of an object store that are named by their place in the mirror."""
    for path in paths:
        mirror.bring(path.absolute())


def compare(
    base: str,
    candidate: str,
    report: str | None = None,
    items: int = 20,
    csv: Path | None = None,
    margin: float | None = None,
) -> str:
    """Two rows as Markdown; all items that differ go to `csv`. RunError says what does not fit."""
    from reports import compare_formats
    from reports.compare import compare_all, scored
    from reports.pairs import open_pairs

    _bring_rows([base, candidate], report)
    with _readable():
        pairs, gaps = open_pairs(base, candidate, home(), report)
        pairs, unscored = scored(pairs)
        found = compare_all(pairs, margin=margin)
    if csv:
        write_text(csv, compare_formats.comma_separated(found))
    return compare_formats.markdown(found, items, [str(gap) for gap in gaps + unscored])


def gate(
    base: str,
    candidate: str,
    file: Path | None = None,
    report: str | None = None,
    markdown: Path | None = None,
    junit: Path | None = None,
) -> tuple[str, int]:
    """The gate's summary and exit code: 0 pass, 1 fail, 3 inconclusive.

    Without a file, suites that neither row has a score of are left out and named; where one of them
    has, the other may have failed, and no gate passes.
    RecipeError, which is exit 2, for a wrong gate file and for runs that cannot be compared: a
    failed measurement must not look like a failed candidate.
    """
    from reports import gate_formats
    from reports.compare import NotComparable, scored
    from reports.gate import EXIT, default, judge
    from reports.pairs import open_pairs

    try:
        _bring_rows([base, candidate], report)
        with _readable():
            pairs, gaps = open_pairs(base, candidate, home(), report)
            left: list[str] = []
            if file:
                result = judge(load(file, pairs), pairs)
            else:
                pairs, unscored = scored(pairs)
                lost = [gap for gap in gaps + unscored if gap.some]
                if lost:
                    what = "name the suites that the gate is about in a file (--gate)"
                    raise NotComparable(f"{'; '.join(map(str, lost))}; {what}")
                result, left = judge(default(pairs), pairs), [str(g) for g in gaps + unscored]
        text = gate_formats.markdown(result, left)
        failed = [
            _failure(path, content)
            for path, content in ((markdown, text), (junit, gate_formats.junit(result, left)))
            if path
        ]
        if any(failed):  # the verdict is there all the same
            raise RunError("\n".join([text, *filter(None, failed)]))
    except RunError as error:
        raise RecipeError(str(error)) from error
    return text, EXIT[result.outcome]


def _failure(path: Path, content: str) -> str | None:
    """Why a file could not be written; None if it was."""
    try:
        write_text(path, content)
    except RunError as error:
        return str(error)
    return None


def holds_runs(path: Path) -> bool:
    """Whether a path is a finished run, a folder of such, or a report."""
    return path.is_dir() and bool(
        (path / "manifest.json").is_file()
        or (path / "index.json").is_file()
        or next(path.glob("*/manifest.json"), None)
    )


def report_runs(paths: Sequence[Path], reference: str | None, name: str) -> None:
    """Report runs without a recipe: rows are the runs' own, the first one is the reference.

    RunError if a run cannot be read, or two runs claim one place; RecipeError for a reference that
    is none of the rows.
    """
    from reports.compare import opened
    from reports.leaderboard import find_runs, row_names
    from reports.report import save
    from reports.table import read

    _bring_runs(paths)
    with _readable():
        runs, imported = find_runs(paths)
    if imported:
        raise RecipeError("a report reads records; result files and tables are for `leaderboard`")
    names = row_names(runs)
    rows = list(dict.fromkeys(names))
    if reference is not None and reference not in rows:
        raise RecipeError(f"--reference {reference}: no such row; rows: {', '.join(rows)}")
    suites = _suites(runs)
    cells: dict[str, dict[str, dict[str, str]]] = {
        row: {suite: {"reason": "not measured: no such run was given"} for suite in suites}
        for row in rows
    }
    for row, run in zip(names, runs, strict=True):
        suite = str(run.manifest["suite"])
        taken = cells[row][suite].get("run")
        if taken:
            raise RunError(f"{row} on {suite}: two runs, {taken} and {run.folder}; give one")
        cells[row][suite] = {"run": str(run.folder.resolve())}
    path = made_home() / "reports" / f"{name}-{identity(cells)[:8]}" / "index.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _index(name, reference or rows[0], runs, names, suites) | {"cells": cells})
    with _readable():
        found = opened(read, path)
        show(found, save(found, path.parent))
    mirror.send(path.parent)


def _suites(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """What is known of each suite; of two versions, the tasks of both."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        whole = found.setdefault(str(run.manifest["suite"]), run.manifest | {"tasks": []})
        known = {task.get("title", task["task"]) for task in whole["tasks"]}
        tasks = run.manifest["tasks"]
        whole["tasks"] += [t for t in tasks if t.get("title", t["task"]) not in known]
    return found


def _index(
    name: str,
    reference: str,
    runs: Sequence[Run],
    names: Sequence[str],
    suites: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """A report's index as far as runs know it: how rows were made is not in them."""
    made = dict.fromkeys(("folder", "cost", "training_log"))
    first = {row: runs[names.index(row)].manifest for row in dict.fromkeys(names)}
    rows = [
        {"name": row, "kind": "run", "identity": manifest["model_identity"], "captures": []}
        | {"summary": f"model {str(manifest['model_identity'])[:8]}"}
        | made
        for row, manifest in first.items()
    ]
    listed = [
        {"name": suite, "title": suite, "rule": m.get("rule", "macro"), "tasks": m["tasks"]}
        | {"without": _without(suite)}
        for suite, m in suites.items()
    ]
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "recipe": name,
        "recipe_yaml": "".join(f"{run.folder}\n" for run in runs),
        "overrides": [],
        "reference": reference,
        "seed": runs[0].manifest.get("seed"),
        "rows": rows,
        "suites": listed,
        "extra": {"prompts": _prompts(runs)},
        # Where the runs were measured is not in them.
        "facts": {"machine": f"reported on {machine()}", "created": now, "seconds": 0}
        | provenance(),
    }


def _without(suite: str) -> list[str]:
    """Tasks that the second average of one of our suites leaves out; none of any other suite."""
    from tasks.suite import known_suites, load_suite

    return list(load_suite(suite).without) if suite in known_suites() else []


def _prompts(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """What was asked, by suite and protocol, as far as the runs' own stores have kept it."""
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        protocol = str(run.manifest["protocol"])
        path = run.folder.resolve().parent.parent / "data" / f"prompts-{protocol}.parquet"
        if path.is_file():
            found.setdefault(str(run.manifest["suite"]), {})[protocol] = str(path)
    return found


def leaderboard(paths: Sequence[Path], form: str = "markdown", published: bool = False) -> str:
    """Runs, reports, result files of lm-eval and tables of scores ranked; `form`: of FORMATS.

    published: also what papers printed of the suites that the runs measured.
    """
    from reports.leaderboard import boards, find_runs
    from reports.leaderboard_formats import FORMATS

    if form not in FORMATS:
        raise RecipeError(f"--format {form}: unknown; known: {', '.join(FORMATS)}")
    _bring_runs(paths)
    with _readable():
        runs, imported = find_runs(paths)
        if published:
            suites = dict.fromkeys(str(run.manifest["suite"]) for run in runs)
            imported.append([score for suite in suites for score in _printed(suite)])
        return FORMATS[form](boards(runs, imported))


def _printed(suite: str) -> list[Imported]:
    """What papers printed of a suite: each model's first average, or its only task."""
    from reports.lm_eval_results import Imported
    from tasks.published import PUBLISHED

    out = []
    for table in PUBLISHED.get(suite, ()):
        named = list(table.averages) or list(table.tasks)
        if len(named) > 1 and not table.averages:
            continue
        what = f", {named[0]}" if table.averages else ""
        origin = f"published: {table.paper}, {table.table}{what}"
        count = sum(table.items.values()) or None
        for model in table.models:
            score = table.of(model).get(named[0])
            if score is None:  # not printed
                continue
            out.append(
                Imported(model, suite, "score", "", score, None, count, None, "", True, origin)
            )
    return out
