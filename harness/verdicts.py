"""`kfuse compare`, `gate` and `leaderboard`: names to finished runs, the reports room's answer out.

What a user got wrong becomes one of the two errors here; the reports room itself knows neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusion.errors import RunError
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
