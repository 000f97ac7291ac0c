"""A report as text: terminal, Markdown and CSV.

Add a format: a function of a Report and its line in FORMATS at the foot.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from reports import costs, lines_formats
from reports.calibration import calibrate
from reports.cells import Average, Cell, Column, Gain, Report
from reports.text import code, interval, number, signed
from reports.text import escape as _escape

if TYPE_CHECKING:
    from rich.console import RenderableType

SIGN = (
    "gain: paired difference to the reference, positive is better whatever the metric's direction"
)


def score_text(cell: Cell, column: Column) -> str:
    """Score and interval, or that it was not measured; then the suite's second average."""
    text = f"{number(cell.score, column)} {interval(cell.low, cell.high, column)}".strip()
    text = "not measured" if cell.reason else text
    other = cell.without
    if other is None:
        return text
    span = interval(other.low, other.high, column)
    return f"{text}; {other.title} {number(other.score, column)} {span}".strip()


def gain_text(cell: Cell, column: Column, reference: str) -> str:
    """Gain, interval and verdict in words."""
    if cell.row == reference and not cell.reason:
        return "reference"
    if cell.gain is None:
        return cell.no_gain or ""
    gain = cell.gain
    span = interval(gain.low, gain.high, column, with_sign=True)
    return f"{signed(gain.value, column)} {span} {gain.verdict}".replace("  ", " ")


def heading(column: Column) -> str:
    """A column's name, unit and direction."""
    unit = "%" if column.unit else "bits"
    return f"{column.name} ({unit}, {'higher' if column.higher_is_better else 'lower'} is better)"


def partial_text(report: Report, column: Column) -> str:
    """How much of the suite was measured, where it was not all."""
    cells = [report.cell(row["name"], column.name) for row in report.rows]
    sizes = sorted({(c.n, c.n_total) for c in cells if c.partial})
    return ", ".join(f"partial: {n} of {total} items" for n, total in sizes)


def headline(report: Report) -> str:
    """The comparison in one sentence: what is better, what worse, what is open."""
    parts = []
    gains = {
        (row["name"], column.name): gain
        for row in report.rows
        for column in report.columns
        if (gain := report.cell(row["name"], column.name).gain)
    }
    for verdict in ("better", "worse", "equivalent"):
        for column in report.columns:
            cases = []
            for row in report.rows:
                gain = gains.get((row["name"], column.name))
                if gain and gain.verdict == verdict:
                    by = signed(abs(gain.value), column).lstrip("+")
                    cases.append(row["name"] + (f" by {by}" if verdict != "equivalent" else ""))
            if cases:
                unit = " points" if column.unit else " bits per byte"
                unit = unit if verdict != "equivalent" else ""
                parts.append(f"{verdict} on {column.name}: {', '.join(cases)}{unit}")
    open_ones = sum(gain.verdict == "inconclusive" for gain in gains.values())
    if open_ones:
        parts.append(f"{open_ones} comparison{'s' * (open_ones > 1)} inconclusive")
    if not parts:
        return f"No row could be compared with {report.reference}."
    return f"Against {report.reference}: " + "; ".join(parts) + "."


def power(report: Report, column: Column) -> str:
    """The smallest gain that these items could have shown."""
    gains: list[Gain] = []
    for row in report.rows:
        gain = report.cell(row["name"], column.name).gain
        if gain is not None and gain.detectable > 0:
            gains.append(gain)
    if not gains:
        return ""
    low, high = min(g.detectable for g in gains), max(g.detectable for g in gains)
    unit = " points" if column.unit else " bits"
    ends = [number(value, column) for value in (low, high)]
    span = ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
    return f"{column.name}: {span}{unit}"


def reasons(report: Report) -> list[str]:
    """Why cells have no number, equal reasons together."""
    grouped: dict[str, list[str]] = {}
    for cell in report.gaps:
        reason = str(cell.reason).removeprefix("not measured: ")
        grouped.setdefault(reason, []).append(f"{cell.row}/{cell.suite}")
    return [f"{', '.join(cells)}: {reason}" for reason, cells in grouped.items()]


def notes(report: Report) -> list[str]:
    """What was not done the usual way, equal notes of a row together."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for cell in report.cells.values():
        for note in (*cell.notes, *([averages_text(cell.others)] if cell.others else [])):
            grouped.setdefault((cell.row, note), []).append(cell.suite)
    return [f"{row}, {', '.join(suites)}: {note}" for (row, note), suites in grouped.items()]


def terminal(report: Report) -> RenderableType:
    """Rows × suites with gains, then what was not measured and why, for rich to print."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{report.recipe}: gains against {report.reference}")  # names hold brackets
    table = Table(title=title, title_justify="left")
    table.add_column("row", no_wrap=True)
    for column in report.columns:
        note = partial_text(report, column)
        table.add_column(Text(heading(column) + (f"\n{note}" if note else "")))
    colours = {"better": "green", "worse": "red"}
    for row in report.rows:
        cells: list[Text] = []
        for column in report.columns:
            cell = report.cell(row["name"], column.name)
            style = colours.get(cell.gain.verdict, "") if cell.gain else ""
            second = gain_text(cell, column, report.reference)
            cells.append(Text(f"{score_text(cell, column)}\n{second}".rstrip(), style=style))
        table.add_row(Text(row["name"], style="bold"), *cells)
    lines = [headline(report), SIGN]
    shown = [text for column in report.columns if (text := power(report, column))]
    if shown:
        lines.append("smallest gain that these items show with 80 % power: " + "; ".join(shown))
    lines += [f"not measured: {text}" for text in reasons(report)]
    lines += [f"note: {text}" for text in notes(report)]
    return Group(table, *(Text(line) for line in lines), *lines_formats.terminal(report))


FAILURES = {
    "truncated": "cut at the token limit",
    "unextracted": "no answer found",
    "unparsed": "verdict not readable",
    "order": "verdict turned by the order of answers",
    "tie": "best choices equal",
    "infra": "not judged",
}


def kinds(report: Report) -> dict[str, str]:
    """FAILURES by what they are called, those of judges only where a judge was asked."""
    seen = {kind for cell in report.cells.values() for kind, _ in cell.health}
    judged = {"unparsed", "order"}
    return {kind: words for kind, words in FAILURES.items() if kind not in judged - seen}


def health(report: Report) -> list[str]:
    """Markdown lines that count what went otherwise than meant, by row and suite; none if nothing.

    An item may count in two columns; only what was not judged is left out of scores.
    """
    found = [(cell, dict(cell.health)) for cell in report.cells.values()]
    found = [(cell, counts) for cell, counts in found if any(counts.values())]
    if not found:
        return []
    lines = ["", "## Items that did not go as meant", ""]
    shown_kinds = kinds(report)
    lines.append(f"| row | suite | items | {' | '.join(shown_kinds.values())} |")
    lines.append("|" + " --- |" * (3 + len(shown_kinds)))
    for cell, counts in found:
        shown = " | ".join(str(counts.get(kind, "–")) for kind in shown_kinds)
        lines.append(f"| {_escape(cell.row)} | {_escape(cell.suite)} | {cell.n} | {shown} |")
    return lines


def token_perplexities(report: Report) -> list[str]:
    """Markdown lines with each row's token perplexity on whole texts; none if nobody counted."""
    lines = ["", "## Token perplexity", ""]
    lines += ["Per token of each row's own tokenizer: not comparable across tokenizers.", ""]
    lines += ["| row | suite | task | perplexity |", "|" + " --- |" * 4]
    found = [
        f"| {_escape(c.row)} | {_escape(c.suite)} | {_escape(t.title)} | {t.token_perplexity:.2f} |"
        for c in report.cells.values()
        for t in c.tasks
        if t.token_perplexity is not None
    ]
    return [*lines, *found] if found else []


def programs(report: Report) -> list[str]:
    """Markdown lines that count how programs ended, by row and suite; none if none was run."""
    found = [cell for cell in report.cells.values() if cell.programs]
    if not found:
        return []
    kinds = list(dict.fromkeys(kind for cell in found for kind, _ in cell.programs))
    names = ["programs", *(kind.replace("_", " ") for kind in kinds if kind != "programs")]
    lines = ["", "## How programs ended", "", f"| row | suite | {' | '.join(names)} |"]
    lines.append("|" + " --- |" * (2 + len(names)))
    for cell in found:
        counts = dict(cell.programs)
        shown = " | ".join(str(counts.get(kind, "–")) for kind in kinds)
        lines.append(f"| {_escape(cell.row)} | {_escape(cell.suite)} | {shown} |")
    several = [
        f"- {_escape(cell.row)} on {_escape(cell.suite)}: {passes_text(cell)}"
        for cell in found
        if cell.passes
    ]
    return [*lines, "", *several] if several else lines


def passes_text(cell: Cell) -> str:
    """pass@k for k > 1 with intervals, percent."""
    return averages_text(cell.passes)


def averages_text(some: Sequence[Average]) -> str:
    """Other averages of a suite with intervals, percent."""
    kind = Column("", "", True, "%")
    return ", ".join(
        f"{one.title} {number(one.score, kind)} {interval(one.low, one.high, kind)}".rstrip()
        for one in some
    )


def _published(report: Report) -> list[str]:
    """Published numbers beside the measured ones, as a section of its own."""
    found = calibrate(report)
    if not found:
        return []
    lines = ["", "## Published", ""]
    lines += ["| row | suite | task | published | measured | difference | verdict | source |"]
    lines += ["|" + " --- |" * 8]
    for entry in found:
        values = [f"{100 * entry.published:.2f}", "–", "–"]
        if entry.measured is not None and entry.difference is not None:
            values[1:] = [f"{100 * entry.measured:.2f}", f"{100 * entry.difference:+.2f}"]
        names = [_escape(text) for text in (entry.row, entry.suite, entry.task)]
        verdict = _escape(f"{entry.verdict}: {entry.reason}")
        lines.append(f"| {' | '.join([*names, *values, verdict, _escape(entry.source)])} |")
    return lines


def _seeds(report: Report) -> list[str]:
    """Variants over their training seeds, where there are several."""
    if not report.seeded:
        return []
    kinds = {column.name: column for column in report.columns}
    head = "variant | against | suite | seeds | gain | error of seeds | error of items | verdict"
    lines = ["", "## Over training seeds", "", f"| {head} |", "|" + " --- |" * 8]
    for x in report.seeded:
        kind = kinds[x.suite]
        span = interval(x.low, x.high, kind, with_sign=True)
        cells = [
            ", ".join(x.rows), ", ".join(x.reference), x.suite, str(len(x.rows)),
            f"{signed(x.gain, kind)} {span}", number(x.seed_error, kind),
            number(x.item_error, kind), x.verdict,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(_escape(cell) for cell in cells)} |")
    return lines


def markdown(report: Report) -> str:
    """The report as Markdown tables."""
    lines = [f"# {_escape(report.recipe)}", "", _escape(headline(report)), ""]
    names = [_escape(heading(column)) for column in report.columns]
    lines += [f"| row | {' | '.join(names)} |", "|" + " --- |" * (len(names) + 1)]
    for row in report.rows:
        shown = []
        for column in report.columns:
            cell = report.cell(row["name"], column.name)
            gain = gain_text(cell, column, report.reference)
            text = score_text(cell, column) + (f"; {gain}" if gain else "")
            shown.append(_escape(text))
        lines.append(f"| {_escape(row['name'])} | {' | '.join(shown)} |")
    lines += ["", f"{SIGN}. Intervals are 95 %; verdicts at 5 % after Holm's correction.", ""]
    for column in report.columns:
        note = partial_text(report, column)
        if note:
            lines.append(f"- {_escape(column.name)}: {note}")
    shown = [text for column in report.columns if (text := power(report, column))]
    if shown:
        lines.append(f"- smallest gain shown with 80 % power: {_escape('; '.join(shown))}")
    lines += [f"- not measured: {_escape(text)}" for text in reasons(report)]
    lines += [f"- note: {_escape(text)}" for text in notes(report)]
    lines += lines_formats.markdown(report)
    lines += _seeds(report)
    lines += _published(report)
    lines += token_perplexities(report)
    lines += health(report)
    lines += programs(report)
    lines += costs.markdown(report)
    lines += ["", "## Rows", ""]
    lines += [f"- {_escape(row['name'])}: {_escape(row['summary'])}" for row in report.rows]
    lines += ["", "## Signatures", ""]
    lines += [f"- {code(c.signature)}" for c in report.cells.values() if c.signature]
    return "\n".join(lines) + "\n"


_COLUMNS = [
    "recipe",
    "row",
    "suite",
    "task",
    "metric",
    "score",
    "low",
    "high",
    "n",
    "n_total",
    "partial",
    "gain",
    "gain_low",
    "gain_high",
    "p_holm",
    "verdict",
    "detectable",
    "reason",
    "signature",
    "token_perplexity",  # per token of the row's own tokenizer
]


def comma_separated(report: Report) -> str:
    """One line for each row and suite, and for each of its tasks; full precision, fractions."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for cell in report.cells.values():
        base = {"recipe": report.recipe, "row": cell.row, "suite": cell.suite}
        total = {"n": cell.n, "n_total": cell.n_total, "partial": cell.partial}
        line: dict[str, Any] = base | {"score": cell.score, "low": cell.low, "high": cell.high}
        line |= {"reason": cell.reason, "signature": cell.signature}
        if not cell.reason:
            line |= total
        if cell.gain:
            gain = cell.gain
            line |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            line |= {
                "p_holm": gain.adjusted,
                "verdict": gain.verdict,
                "detectable": gain.detectable,
            }
        writer.writerow(line)
        if cell.without:
            other = cell.without
            line = base | {"task": other.title, "score": other.score, "n": other.n}
            writer.writerow(line | {"low": other.low, "high": other.high})
        for task in cell.tasks:
            line = base | {"task": task.task, "metric": task.metric, "score": task.score}
            line |= {"low": task.low, "high": task.high, "n": task.n, "n_total": task.n_total}
            line |= {"partial": task.n < task.n_total, "signature": task.signature}
            writer.writerow(line | {"token_perplexity": task.token_perplexity})
    return out.getvalue()


FORMATS: dict[str, tuple[str, Callable[[Report], str]]] = {
    "markdown": ("report.md", markdown),
    "csv": ("report.csv", comma_separated),
    "lines": ("lines.csv", lines_formats.comma_separated),
    "costs": ("costs.csv", costs.comma_separated),
}
