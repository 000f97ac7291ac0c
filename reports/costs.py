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
TOTALS = {
    "made": "s",
    "made_flops": "",
    "measured": "s",
    "measured_flops": "",
    "peak_memory_bytes": "B",
    "flops_per_token": "",
}
TOTAL_HEAD = (
    "row",
    "made in",
    "by FLOPs",
    "measured in",
    "by FLOPs",
    "peak memory",
    "FLOPs a token",
)
NOTE = (
    "FLOPs are counted: 2 a weight and token forward, 6 in training, and attention; of an ensemble "
    "the sum of its members'. A row's sums have what it was made from in them; a stage that rows "
    "share counts whole in each, and is listed under the first. Time and memory are this "
    "machine's; what interrupted runs took before is only known of measurements"
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


def by_row(costs: pd.DataFrame) -> pd.DataFrame:
    """What each row took in all, indexed by row: TOTALS; NaN where nothing of it is known.

    made and measured in seconds; made_flops and measured_flops; the highest peak in bytes; of one
    more token at inference. A stage that rows share counts whole in each.
    """
    import pandas as pd

    measured = costs.stage == "evaluate"
    out = pd.DataFrame(index=costs.row.drop_duplicates(), columns=list(TOTALS), dtype="float64")
    for name, part in (("made", costs[~measured]), ("measured", costs[measured])):
        sums = part.groupby("row")[["seconds", "flops"]].sum(min_count=1)
        out[name], out[f"{name}_flops"] = sums.seconds, sums.flops
    most = costs.groupby("row")[["peak_memory_bytes", "flops_per_token"]].max()
    out[["peak_memory_bytes", "flops_per_token"]] = most
    return out


def once(costs: pd.DataFrame) -> pd.DataFrame:
    """The lines with each shared stage under the first row that has it only."""
    said = [column for column in costs.columns if column != "row"]
    return costs[~((costs.shared_by > 1) & costs.duplicated(said))]


def markdown(report: Report) -> list[str]:
    """Lines of Markdown: rows, their stages, and what the figures are; none if nothing is known."""
    costs = frame(report)
    if costs.empty:
        return []
    lines = ["", "## Cost", "", f"| {' | '.join(TOTAL_HEAD)} |", "|" + " --- |" * len(TOTAL_HEAD)]
    for row, sums in by_row(costs).iterrows():
        shown = [scaled(sums[name], unit) for name, unit in TOTALS.items()]
        lines.append(f"| {' | '.join(escape(text) for text in (str(row), *shown))} |")
    heading = ["row", "stage", "wall", "CPU", "GPU", "FLOPs", "tokens", "written", "peak memory"]
    heading += ["FLOPs a token"]
    lines += ["", f"| {' | '.join(heading)} |", "|" + " --- |" * len(heading)]
    for cost in once(costs).to_dict("records"):
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
