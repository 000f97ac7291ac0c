"""Panels of what rows come to beside the models that they draw on, and of domains in a paper."""

from __future__ import annotations

from reports.cells import Column, Report
from reports.lines import BEST, EMERGENT, FORGOTTEN, GAP, ITEM_ORACLE, TASK_ORACLE, Line
from reports.lines_formats import NOTE
from reports.panels import MISSING, Draw, Panel, Table, Value, count, share, words
from reports.text import interval, number


def references(report: Report) -> Panel | None:
    """Best source and oracles of each suite; gap recovered, forgotten and emergent of each row."""
    columns = {column.name: column for column in report.columns}
    of_sources = []
    of_rows: dict[tuple[str, str], dict[str, Value]] = {}
    for line in report.lines:
        if line.name in (BEST, TASK_ORACLE, ITEM_ORACLE):
            # An oracle is of all sources; the best one is a row and has its signature.
            sign = (
                report.cell(line.detail, line.suite).signature
                if line.detail and line.name == BEST
                else ""
            )
            of_sources.append(_of_source(line, columns[line.suite], sign))
        elif line.name in (GAP, FORGOTTEN, EMERGENT):
            sign = report.cell(line.row, line.suite).signature
            value, span, _ = share(line)
            told = [span.text, line.detail] if line.value is not None else [line.reason]
            note = " ".join(text for text in told if text != MISSING.text)
            shown = Value(value.text, value.order, sign, value.tone, note)
            of_rows.setdefault((line.suite, line.row), {})[line.name] = shown
    tables = []
    if of_sources:
        head = ["suite", "line", "score", "95 % interval", "items", "which"]
        tables.append(Table("Of the sources", head, tuple(of_sources)))
    if of_rows:
        named = (GAP, FORGOTTEN, EMERGENT)
        lines = [
            (words(row), words(suite), *(found.get(name, MISSING) for name in named))
            for (suite, row), found in of_rows.items()
        ]
        head = ["row", "suite", *(f"{name}, %" for name in named)]
        tables.append(Table("Rows beside their sources", head, tuple(lines)))
    text = (f"{NOTE[0].upper()}{NOTE[1:]}.",)
    return Panel("Reference lines", text, tables=tuple(tables)) if tables else None


def _of_source(line: Line, column: Column, sign: str) -> tuple[Value, ...]:
    start = (words(line.suite), words(line.name))
    if line.value is None:
        gap = Value("–", tone="words gap", note=line.reason)
        return (*start, gap, MISSING, MISSING, MISSING)
    span = Value(interval(line.low, line.high, column) or "–", line.low)
    value = Value(number(line.value, column), line.value, sign)
    return (*start, value, span, count(line.n), words(line.detail))


def domains(report: Report) -> Panel | None:
    """A paper's table of bits per byte by domain, whose stand-ins this report measures."""
    paper = report.domains
    if not paper:
        return None
    lines = tuple(
        (words(name), *(Value(f"{v:.4f}", v, f"published: {paper['source']}") for v in values))
        for name, values in paper["rows"].items()
    )
    table = Table(f"{paper['source']}, as printed", ["row", *paper["columns"]], lines)
    text = (f"Not comparable with the rows of this report: {paper['unlike']}.",)
    return Panel("Published bits per byte by domain", text, tables=(table,))


PANELS: dict[str, Draw] = {"references": references, "domains": domains}
