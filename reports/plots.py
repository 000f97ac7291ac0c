"""Plots as inline SVG: gains with intervals, and training curves; a table is beside each."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.records import read_training_log
from reports.table import Column, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "better": "#1a7f37",
    "worse": "#cf222e",
    "equivalent": "#0969da",
    "inconclusive": "#6e7781",
}
INK = "#6e7781"  # readable on light and dark pages


def _svg(figure: Figure, label: str) -> str:
    """A figure as an SVG element with a label for screen readers."""
    from html import escape

    out = io.StringIO()
    # No date and fixed ids, so that the same report is the same bytes.
    figure.savefig(
        out, format="svg", metadata={"Date": None}, transparent=True, bbox_inches="tight"
    )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    import matplotlib

    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "kfuse",
            "svg.fonttype": "none",
            "text.usetex": False,
            "text.parse_math": False,  # names may hold dollar signs
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height))
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def forest(report: Report, column: Column) -> str | None:
    """Gains of all rows on one suite with 95 % intervals; None if no row differs anywhere."""
    gains = {row["name"]: report.cell(row["name"], column.name).gain for row in report.rows}
    rows = [name for name, gain in gains.items() if gain]
    if not any(gain and gain.low is not None for gain in gains.values()):
        return None
    scale = 100 if column.unit else 1
    figure, axes = _figure(6, 0.7 + 0.38 * len(rows))
    for place, name in enumerate(reversed(rows)):
        gain = gains[name]
        assert gain
        colour = COLOURS[gain.verdict]
        if gain.low is not None and gain.high is not None:
            axes.plot([scale * gain.low, scale * gain.high], [place, place], color=colour, lw=2)
        axes.plot([scale * gain.value], [place], "o", color=colour)
    axes.axvline(0, color=INK, lw=1, ls=":")
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    unit = "points" if column.unit else "bits per byte saved"
    axes.set_xlabel(f"gain over {report.reference}, {unit} (right is better)")
    return _svg(figure, f"Gains on {column.name} over {report.reference}")


def training(report: Report) -> str | None:
    """Causal-LM loss (and fusion loss, dashed) of every trained row by tokens, or None."""
    logs = [
        (row["name"], read_training_log(Path(report.home) / row["training_log"]))
        for row in report.rows
        if row.get("training_log")
    ]
    logs = [(name, log) for name, log in logs if len(log["step"])]
    if not logs:
        return None
    figure, axes = _figure(6, 3)
    for name, log in logs:
        line = axes.plot(log["tokens"], log["clm"], marker="o", ms=3, label=f"{name}: CLM")[0]
        if any(log["fusion"]):
            axes.plot(
                log["tokens"],
                log["fusion"],
                ls="--",
                color=line.get_color(),
                label=f"{name}: fusion",
            )
    axes.set_xlabel("target tokens read")
    axes.set_ylabel("nats a position")
    axes.legend(frameon=False)
    return _svg(figure, "Training curves")
