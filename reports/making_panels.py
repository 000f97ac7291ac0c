"""Panels on how rows came to be and what they cost: training, sources, time, cost and quality."""

from __future__ import annotations

from reports import costs, plots
from reports.cells import Report
from reports.lines import WON
from reports.panels import MISSING, Draw, Figure, Panel, Table, Value, count, score, share, words


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
    shown = [line for line in report.lines if line.name == WON and line.value is not None]
    if not shown:
        return None
    rows = tuple((words(x.row), words(x.detail.rpartition(":")[0]), *share(x)) for x in shown)
    text = (
        "A source wins a block that it predicts in fewest bits per byte; a tie goes to the earlier "
        "source. MinCE fuses the winner's distributions.",
    )
    head = ["row", "source", "blocks won, %", "95 % interval", "blocks"]
    return Panel("What the sources win", text, tables=(Table("Sources by row", head, rows),))


def quality(report: Report) -> Panel | None:
    """Score against arithmetic a token: an ensemble runs all its members, a fused model one."""
    figures, lines = [], []
    for column in report.columns:
        points = []
        for row in report.rows:
            cell = report.cell(row["name"], column.name)
            parts = report.parts(row["name"], column.whole)
            price = next((dict(c.cost).get("flops_per_token") for c in parts if c.cost), None)
            if cell.score is not None and price:
                scale = 100 if column.unit else 1
                points.append((cell.row, price, scale * cell.score))
                sign = cell.signature
                cost = Value(costs.scaled(price), price, sign)
                own = score(cell.score, column, signature=sign)
                lines.append((words(cell.row), words(cell.suite), cost, own))
        front = _front([(cost, value) for _, cost, value in points], column.higher_is_better)
        drawn = [(*point, on) for point, on in zip(points, front, strict=True)]
        unit = f"{column.name}, {'%' if column.unit else 'bits per byte'}"
        svg = plots.scatter(drawn, "FLOPs a token", unit, f"Cost and quality on {column.name}")
        if svg:
            figures.append(Figure(column.title, svg))
    if not figures:
        return None
    text = (
        "FLOPs that one more token takes; an ensemble's are its members' sum. Named points are on "
        "the front: no other row is at least as good for less.",
    )
    head = ["row", "suite", "FLOPs a token", "score"]
    table = Table("Cost and scores", head, tuple(lines))
    return Panel("Cost and quality", text, tuple(figures), (table,), folded=True)


def _front(points: list[tuple[float, float]], higher: bool) -> list[bool]:
    """Whether no other point costs no more and is no worse, with one of both better."""
    turned = [(cost, value if higher else -value) for cost, value in points]
    return [
        not any(
            other != point and other[0] <= point[0] and other[1] >= point[1] for other in turned
        )
        for point in turned
    ]


def spent(report: Report) -> Panel | None:
    """What every stage of every row took; a dash where nobody measured or counted."""
    frame = costs.frame(report)
    if frame.empty:
        return None
    lines = []
    for entry in costs.once(frame).to_dict("records"):
        stage = entry["stage"] if entry["of"] == entry["row"] else f"{entry['stage']} {entry['of']}"
        note = f"shared by {entry['shared_by']} rows" if entry["shared_by"] > 1 else ""
        sign = ""
        if entry["stage"] == "evaluate":
            parts = report.parts(entry["row"], entry["of"])
            # What a suite without an average took is of no one task's signature.
            sign = parts[0].signature if len(parts) == 1 else ""
        line = [words(entry["row"]), words(stage, note=note)]
        for name, unit in _SPENT.items():
            value = entry[name]
            known = value == value  # NaN: not known
            line.append(Value(costs.scaled(value, unit), value, sign) if known else MISSING)
        lines.append(tuple(line))
    head = ["row", "stage", "wall", "CPU", "GPU", "FLOPs", "tokens", "written", "peak memory"]
    return Panel("Stages", tables=(Table("Stage by stage", head, tuple(lines)),), folded=True)


def totals(report: Report) -> Panel | None:
    """What each row took to make and to measure, in all."""
    frame = costs.frame(report)
    if frame.empty:
        return None
    lines = []
    for row, cost in costs.by_row(frame).iterrows():
        line = [words(row)]
        for name, unit in costs.TOTALS.items():
            value = float(cost[name])
            line.append(Value(costs.scaled(value, unit), value) if value == value else MISSING)
        lines.append(tuple(line))
    table = Table("Each row, with all that it was made from", costs.TOTAL_HEAD, tuple(lines))
    return Panel("Costs", (f"{costs.NOTE}.",), tables=(table,))


_SPENT = {
    "seconds": "s", "cpu_seconds": "s", "gpu_seconds": "s", "flops": "", "tokens": "",
    "bytes": "B", "peak_memory_bytes": "B",
}  # fmt: skip


PANELS: dict[str, Draw] = {
    "training": training,
    "wins": wins,
    "quality": quality,
    "costs": totals,
    "stages": spent,
}
