"""A report as one self-contained page: no network, no script, light and dark, phone and print."""

from __future__ import annotations

from pathlib import Path

from reports import formats, plots
from reports.table import Column, Report, TaskScore


def page(report: Report) -> str:
    """The page; every text in it is escaped, whatever names and outputs hold."""
    from jinja2 import Environment, FileSystemLoader

    drawn = [(column, plots.forest(report, column)) for column in report.columns]

    def tasks(column: Column) -> list[tuple[str, list[TaskScore | None]]]:
        cells = [report.cell(row["name"], column.name) for row in report.rows]
        names = {task.task: task.title for cell in cells for task in cell.tasks}
        return [
            (title, [next((t for t in cell.tasks if t.task == name), None) for cell in cells])
            for name, title in names.items()
        ]

    rooms = FileSystemLoader(Path(__file__).parent)
    return (
        Environment(loader=rooms, autoescape=True)
        .get_template("page.html")
        .render(
            report=report,
            facts=report.facts,
            headline=formats.headline(report),
            sign=formats.SIGN,
            direction=lambda c: formats.heading(c).removeprefix(c.name).strip(" ()"),
            partial=lambda c: formats.partial_text(report, c),
            score=formats.score_text,
            gain=lambda cell, column: formats.gain_text(cell, column, report.reference),
            number=formats.number,
            power=[text for c in report.columns if (text := formats.power(report, c))],
            gaps=formats.reasons(report),
            notes=formats.notes(report),
            forests=[(column, svg) for column, svg in drawn if svg],
            curves=plots.training(report),
            tasks=tasks,
            measured=[cell for cell in report.cells.values() if not cell.reason],
            dict=dict,
        )
    )
