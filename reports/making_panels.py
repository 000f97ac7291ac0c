"""Panels on how rows came to be and what they cost: training, sources, time, cost and quality."""

from __future__ import annotations

from typing import Any

from reports import plots
from reports.panels import MISSING, Draw, Figure, Panel, Table, Value, count, score, words
from reports.table import Report


def training(report: Report) -> Panel | None:
    """Losses of the trained rows by tokens, and how much of the target the sources cover."""
    logs = plots.training_logs(report)
    if not logs:
        return None
    drawn = {
        "clm": "causal-LM loss, nats a position",
        "fusion": "fusion loss, nats a position",
        "coverage": "share of positions that sources cover",
    }
    figures = []
    for column, label in drawn.items():
        svg = plots.curves(logs, column, label)
        if svg:
            figures.append(Figure(label[0].upper() + label[1:], svg))
    lines = []
    for name, log in logs.items():
        fused = any(log.get("fusion", ()))
        size = len(log["step"])
        line = [words(name), count(size), count(log["tokens"][-1])]
        for column in drawn:
            known = column in log and (fused or column == "clm")
            line += [count(log[column][place], 4) if known else MISSING for place in (0, -1)]
        if fused and "coverage" in log:
            line.append(count(sum(log["coverage"]) / size, 4))
        else:
            line.append(MISSING)
        lines.append(tuple(line))
    head = ["row", "steps", "tokens", "CLM, first", "CLM, last", "fusion, first", "fusion, last"]
    head += ["coverage, first", "coverage, last", "coverage, mean"]
    table = Table("Training logs: first and last step", head, tuple(lines))
    return Panel("Training", figures=tuple(figures), tables=(table,), folded=True)


def wins(report: Report) -> Panel | None:
    """Which source predicts the corpus best, block by block, for every row that fuses sources."""
    lines = []
    for row in report.rows:
        found = report.extra.get("wins", {}).get(row["name"])
        for place, source in enumerate(found["sources"] if found else ()):
            lines.append(
                (
                    words(row["name"]),
                    words(source),
                    Value(f"{100 * found['shares'][place]:.1f}", found["shares"][place]),
                    count(found["bits_per_byte"][place], 4),
                    Value(f"{found['blocks']:,} of {found['of']:,}", found["blocks"]),
                )
            )
    if not lines:
        return None
    text = (
        "A source wins a block that it predicts in fewest bits per byte; a tie goes to the earlier "
        "source. MinCE fuses the winner's distributions."
    )
    head = ["row", "source", "blocks won, %", "bits per byte", "blocks read"]
    return Panel(
        "What the sources win", (text,), tables=(Table("Sources by row", head, tuple(lines)),)
    )


def quality(report: Report) -> Panel | None:
    """Score against arithmetic a token: an ensemble runs all its members, a fused model one."""
    sizes = {row["name"]: row["parameters"] for row in report.rows if row.get("parameters")}
    figures, lines = [], []
    for column in report.columns:
        points = []
        for name, size in sizes.items():
            cell = report.cell(name, column.name)
            if cell.score is not None:
                scale = 100 if column.unit else 1
                points.append((name, 2.0 * size, scale * cell.score))
        front = _front([(cost, value) for _, cost, value in points], column.higher_is_better)
        drawn = [(*point, on) for point, on in zip(points, front, strict=True)]
        unit = f"{column.name}, {'%' if column.unit else 'bits per byte'}"
        svg = plots.scatter(drawn, "FLOP a token", unit, f"Cost and quality on {column.name}")
        if svg:
            figures.append(Figure(column.title, svg))
    forwards = {row["name"]: row.get("forwards", 1) for row in report.rows}
    for name, size in sizes.items():
        line = [words(name), count(forwards[name]), _short(size / 1e6), _short(2 * size / 1e9)]
        for column in report.columns:
            cell = report.cell(name, column.name)
            if cell.score is None:
                line.append(MISSING)
            else:
                line.append(score(cell.score, column, signature=cell.signature))
        lines.append(tuple(line))
    if not figures:
        return None
    text = (
        "2 FLOP for every parameter that reads a token, attention left out; an ensemble counts "
        "every member. Named points are on the front: no other row is at least as good for less."
    )
    head = ["row", "forwards a token", "million parameters read", "GFLOP a token"]
    head += [*(column.name for column in report.columns)]
    table = Table("Cost and scores", head, tuple(lines))
    return Panel("Cost and quality", (text,), tuple(figures), (table,), folded=True)


def _front(points: list[tuple[float, float]], higher: bool) -> list[bool]:
    """Whether no other point costs no more and is no worse, with one of both better."""
    turned = [(cost, value if higher else -value) for cost, value in points]
    return [
        not any(
            other != point and other[0] <= point[0] and other[1] >= point[1] for other in turned
        )
        for point in turned
    ]


def costs(report: Report) -> Panel | None:
    """What building and measuring took."""
    built = []
    for row in report.rows:
        cost = row.get("cost") or {}
        own = cost.get("seconds")
        captured = [entry["cost"].get("seconds", 0) for entry in row.get("captures", ())]
        if own is None and not captured:
            continue
        place = [words(row["name"]), words(row["summary"]), count(own, 1)]
        place += [count(sum(captured), 1) if captured else MISSING]
        place += [count(cost.get("tokens") or None), _gigabytes(cost.get("bytes"))]
        built.append((*place, _gigabytes(cost.get("peak_memory_bytes"))))
    measured = []
    for cell in report.cells.values():
        if cell.reason or not cell.cost:
            continue
        spent: dict[str, Any] = dict(cell.cost)
        tokens, seconds = spent.get("tokens"), spent.get("seconds")
        pace = tokens / seconds if tokens and seconds else None
        sign = cell.signature
        line = [words(cell.row), words(cell.suite), count(cell.n, 0, sign)]
        line += [count(seconds, 1, sign), count(tokens, 0, sign), count(pace, 0, sign)]
        measured.append((*line, _gigabytes(spent.get("peak_memory_bytes"))))
    tables = []
    if built:
        head = ["row", "how it is made", "seconds", "seconds for its sources' distributions"]
        head += ["tokens trained on", "GB on disk", "GB of memory"]
        tables.append(Table("Building", head, tuple(built)))
    if measured:
        head = ["row", "suite", "items", "seconds", "tokens", "tokens a second", "GB of memory"]
        tables.append(Table("Measuring", head, tuple(measured)))
    return Panel("Time and memory", tables=tuple(tables)) if tables else None


def _short(value: float) -> Value:
    return Value(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", value)


def _gigabytes(size: float | None) -> Value:
    return count(size / 1e9 if size else None, 2)


PANELS: dict[str, Draw] = {
    "training": training,
    "wins": wins,
    "quality": quality,
    "costs": costs,
}
