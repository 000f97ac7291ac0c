"""`kfuse compare`, `gate` and `leaderboard`: names to finished runs, the reports room's answer out.

What a user got wrong becomes one of the two errors here; the reports room itself knows neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fusion.errors import RecipeError, RunError
from harness.gate_file import load
from harness.store import home, write_text


@contextmanager
def _readable() -> Iterator[None]:
    """Files that cannot be read and runs that cannot be compared as a RunError."""
    from reports.compare import NotComparable

    try:
        yield
    except (NotComparable, FileNotFoundError) as error:
        raise RunError(str(error)) from error


def compare(
    base: str, candidate: str, report: str | None = None, items: int = 20, csv: Path | None = None
) -> str:
    """Two rows as Markdown; all items that differ go to `csv`. RunError says what does not fit."""
    from reports import compare_formats
    from reports.compare import compare_all, open_pairs

    with _readable():
        found = compare_all(open_pairs(base, candidate, home(), report))
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


def leaderboard(paths: Sequence[Path], form: str = "markdown") -> str:
    """Runs, reports and result files of lm-eval as ranked tables; `form` is a key of FORMATS."""
    from reports.leaderboard import boards, find_runs
    from reports.leaderboard_formats import FORMATS

    if form not in FORMATS:
        raise RecipeError(f"--format {form}: unknown; known: {', '.join(FORMATS)}")
    with _readable():
        return FORMATS[form](boards(*find_runs(paths)))
