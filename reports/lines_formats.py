"""Reference lines and the table by domain as Markdown, for a terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from reports.cells import Column, Report
from reports.lines import BEST, EMERGENT, FORGOTTEN, GAP, ITEM_ORACLE, TASK_ORACLE, WON, Line
from reports.text import escape, interval, number

if TYPE_CHECKING:
    from rich.console import RenderableType

_OF_ROWS = (GAP, FORGOTTEN, EMERGENT)
NOTE = (
    "gap recovered: the way from the best single source to the item oracle, which takes each item "
    "from the source that does best on it; forgotten: of what the target had right, now wrong; "
    "emergent: of what no source had right, now right (a guesser's share is that of chance)"
)


def share_text(line: Line) -> str:
    """A fraction in percent with its interval and what it is a share of."""
    if line.value is None:
        return line.reason
    span = ""
    if line.low is not None and line.high is not None:
        span = f" [{100 * line.low:.1f}, {100 * line.high:.1f}]"
    return f"{100 * line.value:.1f} %{span} ({line.detail})"


def score_text(line: Line, column: Column) -> str:
    """A source's or oracle's score in the suite's unit, with its interval and who it is."""
    if line.value is None:
        return line.reason
    span = interval(line.low, line.high, column)
    return f"{number(line.value, column)} {span} ({line.detail})".replace("  ", " ")


def tables(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """The lines as tables, each a title, a heading and rows of text; none that would be empty."""
    columns = {column.name: column for column in report.columns}
    out = []
    of_suites = []
    for column in report.columns:
        named = [_find(report.lines, column.name, "", name) for name in _SOURCES]
        if any(named):
            shown = [score_text(line, column) if line else "–" for line in named]
            of_suites.append([column.name, *shown])
    if of_suites:
        out.append(("Reference lines", ["suite", *_SOURCES], of_suites))
    of_rows = []
    for suite in columns:
        for row in report.rows:
            found = [_find(report.lines, suite, row["name"], name) for name in _OF_ROWS]
            if any(found):
                shown = [share_text(line) if line else "–" for line in found]
                of_rows.append([suite, row["name"], *shown])
    if of_rows:
        out.append(("Rows beside their sources", ["suite", "row", *_OF_ROWS], of_rows))
    won = [[x.row, share_text(x)] for x in report.lines if x.name == WON]
    if won:
        out.append(("Blocks of the corpus that each source predicts best", ["row", WON], won))
    return [*out, *domains(report)]


_SOURCES = (BEST, TASK_ORACLE, ITEM_ORACLE)


def _find(lines: Iterable[Line], suite: str, row: str, name: str) -> Line | None:
    return next((x for x in lines if (x.suite, x.row, x.name) == (suite, row, name)), None)


def domains(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """Bits per byte of every row in every domain, and a paper's table where the index has one.

    The average is that of the cell: unweighted over domains. The paper's numbers are of other
    models on other text and stand there for their order, not to be compared.
    """
    out = []
    for column in report.columns:
        cells = [report.cell(row["name"], column.name) for row in report.rows]
        titles = list(dict.fromkeys(task.title for cell in cells for task in cell.tasks))
        if column.unit or len(titles) < 2:
            continue
        body = []
        for cell in cells:
            values = {task.title: task.score for task in cell.tasks}
            shown = [number(values.get(title), column) for title in titles]
            body.append([cell.row, *shown, number(cell.score, column)])
        heading = ["row", *titles, "average"]
        out.append((f"{column.name} by domain (bits, lower is better)", heading, body))
    if report.domains:
        paper = report.domains
        rows = [[name, *(f"{v:.4f}" for v in values)] for name, values in paper["rows"].items()]
        title = f"{paper['source']}, as printed: not comparable ({paper['unlike']})"
        out.append((title, ["row", *paper["columns"]], rows))
    return out


def markdown(report: Report) -> list[str]:
    """Lines of Markdown: a section a table."""
    out: list[str] = []
    for title, heading, body in tables(report):
        out += ["", f"## {escape(title)}", "", *_table(heading, body)]
        out += ["", f"{NOTE}."] if heading[2:] == list(_OF_ROWS) else []
    return out


def _table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rows = [heading, *body]
    text = [f"| {' | '.join(escape(cell) for cell in row)} |" for row in rows]
    return [text[0], "|" + " --- |" * len(heading), *text[1:]]


def terminal(report: Report) -> list[RenderableType]:
    """The table of a paper's domains for rich to print; all else is long, and for reading."""
    from rich.table import Table
    from rich.text import Text

    out: list[RenderableType] = []
    for title, heading, body in domains(report) if report.domains else []:
        table = Table(title=Text(title), title_justify="left")
        for name in heading:
            table.add_column(Text(name))
        for row in body:
            table.add_row(*(Text(cell) for cell in row))
        out.append(table)
    return out


_COLUMNS = ["recipe", "suite", "row", "line", "value", "low", "high", "n", "detail", "reason"]


def comma_separated(report: Report) -> str:
    """One row for each line; full precision, fractions or bits per byte."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in report.lines:
        base = {"recipe": report.recipe, "suite": line.suite, "row": line.row, "line": line.name}
        values = {"value": line.value, "low": line.low, "high": line.high, "n": line.n or None}
        writer.writerow(base | values | {"detail": line.detail, "reason": line.reason})
    return out.getvalue()
