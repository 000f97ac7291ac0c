"""Panels of scores: rows × suites, gains, tasks, the heat map of BBH, the languages of programs."""

from __future__ import annotations

from collections.abc import Mapping

from reports import plots
from reports.cells import Cell, Column, Report, TaskScore
from reports.formats import (
    SIGN,
    gain_text,
    heading,
    notes,
    partial_text,
    power,
    reasons,
    score_text,
)
from reports.panels import MISSING, Draw, Figure, Panel, Table, Value, count, score, words
from reports.text import interval, number, signed

STEPS = (0.025, 0.05, 0.10, 0.20)  # differences at which a cell of the heat map is tinted deeper


def scores(report: Report) -> Panel | None:
    """Every row on every suite with interval, gain and verdict, or the reason why not."""
    lines = []
    for row in report.rows:
        line = [words(row["name"], note=row["kind"])]
        for column in report.columns:
            cell = report.cell(row["name"], column.name)
            if cell.reason:
                shown = score_text(cell, column)
                line.append(Value(shown, signature=cell.reason, tone="gap"))
                continue
            note = gain_text(cell, column, report.reference)
            tone = cell.gain.verdict if cell.gain else ""
            shown = score_text(cell, column)
            line.append(Value(shown, cell.score, cell.signature, note=note, note_tone=tone))
        lines.append(tuple(line))
    below = [""]
    for column in report.columns:
        parts = (_direction(column), partial_text(report, column))
        below.append("; ".join(part for part in parts if part))
    text = [
        f"{SIGN[0].upper()}{SIGN[1:]}. Intervals are 95 %; verdicts hold at 5 % after Holm's "
        "correction over all comparisons of this page. What is random here is the draw of "
        "questions: a second training differs, too."
    ]
    shown_power = [told for column in report.columns if (told := power(report, column))]
    if shown_power:
        text.append(
            f"The smallest gain that these items show with 80 % power: {'; '.join(shown_power)}."
        )
    text += [f"Not measured: {reason}" for reason in reasons(report)]
    text += [f"Note: {note}" for note in notes(report)]
    head = ["row", *(column.name for column in report.columns)]
    table = Table("Scores, and gains below them", head, tuple(lines), tuple(below))
    return Panel("Scores and gains", tuple(text), tables=(table,))


def _direction(column: Column) -> str:
    return heading(column).removeprefix(column.name).strip(" ()")


def gains(report: Report) -> Panel | None:
    """A forest plot of the rows' gains for each suite, and the figures behind it."""
    figures, lines = [], []
    for column in report.columns:
        svg = plots.forest(report, column)
        if svg:
            figures.append(Figure(column.title, svg))
        for row in report.rows:
            cell = report.cell(row["name"], column.name)
            if cell.gain:
                lines.append(_gain(cell, column))
    if not lines:
        return None
    head = ["row", "suite", "gain", "95 % interval", "p (Holm)", "verdict", "smallest gain shown"]
    table = Table(
        f"Gains over {report.reference}",
        [*head, "items better", "items worse", "items"],
        tuple(lines),
    )
    return Panel(
        f"Gains over {report.reference}", figures=tuple(figures), tables=(table,), folded=True
    )


def seeds(report: Report) -> Panel | None:
    """Variants with several training seeds: the gain over seeds, and what the seeds do to it."""
    columns = {column.name: column for column in report.columns}
    lines = []
    for found in report.seeded:
        column = columns[found.suite]
        sign = report.cell(found.rows[0], found.suite).signature
        line = [words(", ".join(found.rows)), words(", ".join(found.reference))]
        line += [words(found.suite), count(len(found.rows))]
        span = interval(found.low, found.high, column, with_sign=True)
        shown = signed(found.gain, column)
        line.append(Value(shown, found.gain, sign, found.verdict, span))
        line += [score(e, column, signature=sign) for e in (found.seed_error, found.item_error)]
        line.append(Value(f"{found.adjusted:.3g}", found.adjusted, sign))
        lines.append((*line, words(found.verdict, tone=found.verdict)))
    if not lines:
        return None
    text = (
        "A gain above is that of one training's weights; this one is over seeds. The signature is "
        "the first seed's.",
    )
    head = ["rows", "against", "suite", "seeds", "gain", "error from seeds", "error from items"]
    table = Table("One line a variant", [*head, "p (Holm)", "verdict"], tuple(lines))
    return Panel("Over training seeds", text, tables=(table,))


def _gain(cell: Cell, column: Column) -> tuple[Value, ...]:
    gain = cell.gain
    assert gain
    sign = cell.signature
    shown = gain.detectable if gain.detectable > 0 else None
    return (
        words(cell.row),
        words(cell.suite),
        Value(signed(gain.value, column), gain.value, sign, tone=gain.verdict),
        Value(interval(gain.low, gain.high, column, with_sign=True) or "–", gain.low, sign),
        Value(f"{gain.adjusted:.3g}", gain.adjusted, sign),
        words(gain.verdict, tone=gain.verdict),
        score(shown, column, signature=sign),
        count(gain.better, signature=sign),
        count(gain.worse, signature=sign),
        count(gain.n, signature=sign),
    )


def by_task(report: Report, column: Column) -> list[tuple[str, dict[str, TaskScore]]]:
    """Titles of a suite's tasks with each row's score, in the order in which they are measured."""
    found: dict[str, tuple[str, dict[str, TaskScore]]] = {}
    for row in report.rows:
        for task in report.cell(row["name"], column.name).tasks:
            found.setdefault(task.task, (task.title, {}))[1][row["name"]] = task
    return list(found.values())


def tasks(report: Report) -> Panel | None:
    """The tasks of every suite that has no panel of its own."""
    tables = []
    for column in report.columns:
        if _heated(column) or _in_languages(column):
            continue
        lines = []
        for title, cells in by_task(report, column):
            line = [words(title)]
            for row in report.rows:
                task = cells.get(row["name"])
                if task is None or task.score is None:
                    line.append(MISSING)
                    continue
                span = interval(task.low, task.high, column)
                note = f"{span} n {task.n}".strip()
                line.append(score(task.score, column, signature=task.signature, note=note))
            lines.append(tuple(line))
        if lines:
            head = ["task", *(row["name"] for row in report.rows)]
            tables.append(Table(f"{column.title}: {_direction(column)}", head, tuple(lines)))
    return Panel("Tasks", tables=tuple(tables)) if tables else None


def perplexities(report: Report) -> Panel | None:
    """Token perplexity of each row on each whole text, a table a suite."""
    tables = []
    for column in report.columns:
        found = by_task(report, column)
        lines = []
        for row in report.rows:
            scores = [cells.get(row["name"]) for _, cells in found]
            values = [
                Value(f"{one.token_perplexity:.2f}", one.token_perplexity, one.signature)
                if one and one.token_perplexity is not None
                else MISSING
                for one in scores
            ]
            if any(value is not MISSING for value in values):
                lines.append((words(row["name"]), *values))
        if lines:
            head = ["row", *(title for title, _ in found)]
            tables.append(Table(f"{column.title}: perplexity a token", head, tuple(lines)))
    text = ("Per token of each row's own tokenizer: not comparable across tokenizers.",)
    return Panel("Token perplexity", text, tables=tuple(tables)) if tables else None


def _heated(column: Column) -> bool:
    return column.name.startswith("bbh")


def _in_languages(column: Column) -> bool:
    return column.name.startswith("multipl_e")


def heat_map(report: Report) -> Panel | None:
    """BBH: tasks × rows, tinted by how far a row is from the reference on the task."""
    tables = tuple(_heat(report, column) for column in report.columns if _heated(column))
    tables = tuple(table for table in tables if table.rows)
    if not tables:
        return None
    steps = ", ".join(f"{100 * step:g}" for step in STEPS)
    text = (
        f"Blue cells are above {report.reference}, orange ones below, deeper from {steps} points "
        "on; the difference is below each score. A task alone is a few hundred questions at most: "
        "the suite's gain says what holds."
    )
    return Panel("BIG-Bench Hard by task", (text,), tables=tables)


def _heat(report: Report, column: Column) -> Table:
    lines = []
    for title, cells in by_task(report, column):
        lines.append((words(title), *_tinted(report, column, cells)))
    head = ["task", *(row["name"] for row in report.rows)]
    return Table(f"{column.title}: {_direction(column)}", head, tuple(lines))


def _tinted(report: Report, column: Column, cells: Mapping[str, TaskScore]) -> list[Value]:
    """A task's scores by row, tinted by their differences to the reference's.

    There is no difference where the row must not be compared with the reference.
    """
    base = cells.get(report.reference)
    out = []
    for row in report.rows:
        unlike = report.cell(row["name"], column.name).no_gain
        out.append(_tint(cells.get(row["name"]), None if unlike else base, column))
    return out


def _tint(task: TaskScore | None, base: TaskScore | None, column: Column) -> Value:
    """A score with its difference to the reference's, and the tint that this comes to."""
    if task is None or task.score is None:
        return MISSING
    if base is None or base.score is None or base.signature == task.signature:
        return score(task.score, column, signature=task.signature)
    difference = task.score - base.score
    depth = sum(abs(difference) >= step - 1e-9 for step in STEPS)
    tone = f"{'more' if difference > 0 else 'less'}{depth}" if depth else ""
    note = signed(difference, column)
    return score(task.score, column, signature=task.signature, tone=tone, note=note)


def languages(report: Report) -> Panel | None:
    """MultiPL-E: languages × rows, and both averages, which differ where languages do in size."""
    figures, tables = [], []
    for column in report.columns:
        listed = by_task(report, column) if _in_languages(column) else []
        if not listed:
            continue
        scored: Mapping[str, list[TaskScore]] = {
            row["name"]: [cells[row["name"]] for _, cells in listed if row["name"] in cells]
            for row in report.rows
        }
        lines = [(words(title), *_tinted(report, column, cells)) for title, cells in listed]
        head = ["language", *(row["name"] for row in report.rows)]
        foot = _averages(report, column, scored)
        caption = f"{column.title}: {_direction(column)}"
        tables.append(Table(caption, head, tuple(lines), foot=foot))
        svg = plots.dots(report, column, listed)
        if svg:
            figures.append(Figure(column.title, svg))
    if not tables:
        return None
    text = (
        "Macro: every language counts the same. Micro: every problem does. Tints are those of a "
        f"difference to {report.reference}: blue above, orange below."
    )
    return Panel("Programs by language", (text,), tuple(figures), tuple(tables))


def _averages(
    report: Report, column: Column, scored: Mapping[str, list[TaskScore]]
) -> tuple[tuple[Value, ...], ...]:
    """Two lines: the suite's own score with its interval, and the mean over all problems."""
    macro, micro = [words("macro average")], [words("micro average")]
    for row in report.rows:
        cell = report.cell(row["name"], column.name)
        if cell.score is None:
            macro.append(MISSING)
            micro.append(MISSING)
            continue
        sign = cell.signature
        span = interval(cell.low, cell.high, column)
        macro.append(score(cell.score, column, signature=sign, note=span))
        told = [(task.score, task.n) for task in scored[row["name"]] if task.score is not None]
        mean = sum(value * n for value, n in told) / sum(n for _, n in told)
        sign = sign.replace("rule:macro", "rule:micro")
        micro.append(Value(number(mean, column), mean, sign))
    return tuple(macro), tuple(micro)


PANELS: dict[str, Draw] = {
    "scores": scores,
    "gains": gains,
    "seeds": seeds,
    "bbh": heat_map,
    "languages": languages,
    "tasks": tasks,
    "perplexities": perplexities,
}
