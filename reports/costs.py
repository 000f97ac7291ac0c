"""What rows cost: every stage that a row needed, those of the rows it was made from, too, and one
token at inference.

Read from the manifests by way of the index. Seconds, memory and bytes are as measured on the
machine at hand; FLOPs and tokens are counted. A stage that several rows share (a packed corpus, a
source's distributions) stands under each of them with its whole cost, and says how many share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from reports.cells import Report
from reports.text import escape

if TYPE_CHECKING:
    import pandas as pd

MEASURES = (
    "seconds",
    "cpu_seconds",
    "gpu_seconds",
    "flops",
    "tokens",
    "bytes",
    "peak_memory_bytes",
    "peak_gpu_memory_bytes",
    "flops_per_token",
)
COLUMNS = ("row", "stage", "of", "shared_by", *MEASURES)
NOTE = (
    "FLOPs are counted: 2 a weight and token forward, 6 in training, and attention; of an ensemble "
    "the sum of its members'. A stage that rows share is listed whole under each. Time and memory "
    "are this machine's; what interrupted runs took before is only known of measurements"
)


def frame(report: Report) -> pd.DataFrame:
    """One line for each row and stage, COLUMNS; NaN where a cost is not known, never 0.

    seconds, cpu_seconds, gpu_seconds (wall time by GPUs held), flops, tokens, bytes (written),
    peaks in bytes; flops_per_token: of one more token at inference, for measurements only.
    """
    import pandas as pd

    found = pd.DataFrame(list(_lines(report)), columns=list(COLUMNS))
    return found.astype(dict.fromkeys(MEASURES, "float64"))


def _lines(report: Report) -> Iterator[dict[str, Any]]:
    for row in report.rows:
        for stage in row.get("stages", ()):
            base = {"row": row["name"], "stage": stage["stage"], "of": stage["name"]}
            yield base | {"shared_by": stage["shared_by"]} | _known(stage["cost"])
        for whole in dict.fromkeys(column.whole for column in report.columns):
            names = [column.name for column in report.columns if column.whole == whole]
            cells = [report.cell(row["name"], name) for name in names]
            if any(cell.run for cell in cells):
                cost = dict(next((cell.cost for cell in cells if cell.cost), ()))
                base = {"row": row["name"], "stage": "evaluate", "of": whole}
                yield base | {"shared_by": 1} | _known(cost)


def _known(cost: dict[str, Any]) -> dict[str, Any]:
    return {name: cost.get(name) for name in MEASURES}


def markdown(report: Report) -> list[str]:
    """Lines of Markdown: the table, and what its figures are; none if nothing is known."""
    costs = frame(report)
    if costs.empty:
        return []
    heading = ["row", "stage", "wall", "CPU", "GPU", "FLOPs", "tokens", "written", "peak memory"]
    heading += ["FLOPs a token"]
    lines = ["", "## Cost", "", f"| {' | '.join(heading)} |", "|" + " --- |" * len(heading)]
    for cost in costs.to_dict("records"):
        stage = f"{cost['stage']} {cost['of']}" if cost["of"] != cost["row"] else cost["stage"]
        stage += f" (shared by {cost['shared_by']})" if cost["shared_by"] > 1 else ""
        shown = [f"{cost[name]:.1f} s" if _is(cost[name]) else "–" for name in MEASURES[:3]]
        shown += [scaled(cost["flops"]), scaled(cost["tokens"])]
        shown += [scaled(cost["bytes"], "B"), scaled(cost["peak_memory_bytes"], "B")]
        shown += [scaled(cost["flops_per_token"])]
        lines.append(f"| {' | '.join(escape(t) for t in (cost['row'], stage, *shown))} |")
    return [*lines, "", f"{NOTE}."]


def _is(value: float) -> bool:
    return value == value


def scaled(value: float, unit: str = "") -> str:
    """A number to three digits with k, M, G, T, P or E; a dash for what is not known."""
    if not _is(value):
        return "–"
    for power, prefix in enumerate(("", "k", "M", "G", "T", "P", "E")):
        if abs(value) < 999.5 * 1000**power or prefix == "E":
            return f"{value / 1000**power:.3g} {prefix}{unit}".rstrip()
    raise AssertionError("the last prefix takes all")


def comma_separated(report: Report) -> str:
    """The frame as CSV; a field is empty where a cost is not known."""
    return frame(report).to_csv(index=False, lineterminator="\n")
