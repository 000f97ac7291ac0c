"""`kfuse compare`, `gate` and `leaderboard`: names to finished runs, the reports room's answer out.

What a user got wrong becomes one of the two errors here; the reports room itself knows neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.errors import RecipeError, RunError
from harness.gate_file import load
from harness.store import home, write_text

if TYPE_CHECKING:
    from reports.lm_eval_results import Imported


@contextmanager
def _readable() -> Iterator[None]:
    """Files that cannot be read and runs that cannot be compared as a RunError."""
    from reports.compare import NotComparable

    try:
        yield
    except (NotComparable, FileNotFoundError) as error:
        raise RunError(str(error)) from error


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
    from reports.compare import compare_all, open_pairs

    with _readable():
        found = compare_all(open_pairs(base, candidate, home(), report), margin=margin)
    if csv:
        write_text(csv, compare_formats.comma_separated(found))
    return compare_formats.markdown(found, items)


def gate(
    base: str,
    candidate: str,
    file: Path | None = None,
    report: str | None = None,
    markdown: Path | None = None,
    junit: Path | None = None,
) -> tuple[str, int]:
    """The gate's summary and exit code: 0 pass, 1 fail, 3 inconclusive.

    RecipeError, which is exit 2, for a wrong gate file and for runs that cannot be compared: a
    failed measurement must not look like a failed candidate.
    """
    from reports import gate_formats
    from reports.compare import open_pairs
    from reports.gate import EXIT, default, judge

    try:
        with _readable():
            pairs = open_pairs(base, candidate, home(), report)
            result = judge(load(file, pairs) if file else default(pairs), pairs)
        text = gate_formats.markdown(result)
        if markdown:
            write_text(markdown, text)
        if junit:
            write_text(junit, gate_formats.junit(result))
    except RunError as error:
        raise RecipeError(str(error)) from error
    return text, EXIT[result.outcome]


def leaderboard(paths: Sequence[Path], form: str = "markdown", published: bool = False) -> str:
    """Runs, reports, result files of lm-eval and tables of scores ranked; `form`: of FORMATS.

    published: also what papers printed of the suites that the runs measured.
    """
    from reports.leaderboard import boards, find_runs
    from reports.leaderboard_formats import FORMATS

    if form not in FORMATS:
        raise RecipeError(f"--format {form}: unknown; known: {', '.join(FORMATS)}")
    with _readable():
        runs, imported = find_runs(paths)
        if published:
            suites = dict.fromkeys(str(run.manifest["suite"]) for run in runs)
            imported.append([score for suite in suites for score in _printed(suite)])
        return FORMATS[form](boards(runs, imported))


def _printed(suite: str) -> list[Imported]:
    """What a paper printed of a suite: each model's first average."""
    from reports.lm_eval_results import Imported
    from tasks.published import MODELS, PUBLISHED

    table = PUBLISHED.get(suite)
    if table is None or not table.averages:
        return []
    average = next(iter(table.averages))
    origin = f"published: {table.paper}, {table.table}, {average}"
    return [
        Imported(model, suite, "score", "", table.of(model)[average], None,
                 sum(table.items.values()) or None, None, "", True, origin)
        for model in MODELS
    ]  # fmt: skip
