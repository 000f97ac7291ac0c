"""Plots as inline SVG whose ink follows the page; the numbers are in a table beside each."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.cells import Column, Report, TaskScore
from reports.records import read_training_log
from reports.untrusted import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Stand-ins that matplotlib can draw with; in the SVG the page's own colours take their place.
INK = "#010203"
COLOURS = {
    "better": "#010204",
    "worse": "#010205",
    "inconclusive": "#010206",
    "equivalent": "#010207",
}
_PAGE = {INK: "currentColor", **{colour: f"var(--{name})" for name, colour in COLOURS.items()}}
# Okabe and Ito's colours, without the yellow and the black that a light or a dark page swallows.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKS = "osD^vP"
FEW = 8  # rows up to which each is named beside its point


def _svg(figure: Figure, label: str) -> str:
    """A figure as an SVG element with a label for screen readers."""
    from html import escape

    out = io.StringIO()
    with warnings.catch_warnings():
        # The page's font draws the names, so that a glyph which matplotlib lacks is no loss.
        warnings.filterwarnings("ignore", "Glyph")
        # No date and fixed ids, so that the same report is the same bytes.
        figure.savefig(
            out, format="svg", metadata={"Date": None}, transparent=True, bbox_inches="tight"
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    for drawn, shown in _PAGE.items():
        text = text.replace(drawn, shown)
    prefix = re.sub(r"\W+", "-", label)  # ids are of the whole page
    text = re.sub(r'(id="|href="#|url\(#)', lambda found: found.group() + prefix + "-", text)
    label = escape(plain(label), quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


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
            "legend.labelcolor": INK,
        }
    )
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height))
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _name(text: str) -> str:
    return plain(text, 60).replace("\n", " ")


def _style(place: int) -> dict[str, Any]:
    """A colour and a mark for the n-th series, so that colour alone need not tell them apart."""
    turn = place // len(SERIES)
    mark = MARKS[(place + turn) % len(MARKS)]
    return {"color": SERIES[place % len(SERIES)], "marker": mark, "ms": 5}


def _legend(axes: Any, series: int) -> None:
    """Below the drawing, where it hides nothing."""
    if series > 1:
        columns = min(3, series)
        axes.legend(
            frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, fontsize=9
        )


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
        colour = COLOURS.get(gain.verdict, COLOURS["inconclusive"])
        if gain.low is not None and gain.high is not None:
            axes.plot([scale * gain.low, scale * gain.high], [place, place], color=colour, lw=2)
        mark = {"better": ">", "worse": "<"}.get(gain.verdict, "o")
        axes.plot([scale * gain.value], [place], mark, color=colour, ms=7)
    axes.axvline(0, color=INK, lw=1, ls=":")
    axes.set_yticks(range(len(rows)), [_name(name) for name in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    unit = "points" if column.unit else "bits per byte saved"
    axes.set_xlabel(f"gain over {_name(report.reference)}, {unit} (right is better)")
    return _svg(figure, f"Gains on {column.name} over {report.reference}")


def dots(
    report: Report, column: Column, listed: Sequence[tuple[str, Mapping[str, TaskScore]]]
) -> str | None:
    """Scores of a suite's tasks, a line a task and a mark a row; None for more rows than marks."""
    rows = [row["name"] for row in report.rows]
    if not listed or len(rows) > FEW:
        return None
    scale = 100 if column.unit else 1
    figure, axes = _figure(6, 1.0 + 0.3 * len(listed))
    for place, name in enumerate(rows):
        found = [
            (scale * task.score, len(listed) - 1 - number)
            for number, (_, cells) in enumerate(listed)
            if (task := cells.get(name)) and task.score is not None
        ]
        if found:
            x, y = zip(*found, strict=True)
            axes.plot(x, y, ls="", label=_name(name), **_style(place))
    axes.set_yticks(range(len(listed)), [_name(title) for title, _ in reversed(listed)])
    axes.set_ylim(-0.6, len(listed) - 0.4)
    axes.grid(axis="y", color=INK, alpha=0.2)
    axes.set_xlabel("%" if column.unit else "bits per byte")
    _legend(axes, len(rows))
    return _svg(figure, f"Tasks of {column.name}")


def training_logs(report: Report) -> dict[str, dict[str, tuple[float, ...]]]:
    """The training logs of the rows that have one with a line in it. Errors name the file."""
    logs = {
        row["name"]: read_training_log(Path(report.home) / row["training_log"])
        for row in report.rows
        if row.get("training_log")
    }
    return {name: log for name, log in logs.items() if len(log["step"])}


def curves(
    logs: Mapping[str, Mapping[str, Sequence[float]]], column: str, label: str
) -> str | None:
    """One column of the training logs by tokens; a row whose column is only zeros is left out."""
    drawn = [name for name, log in logs.items() if any(log.get(column, ()))]
    if not drawn:
        return None
    figure, axes = _figure(6, 3)
    for place, name in enumerate(logs):  # a row keeps its colour in all drawings
        if name in drawn:
            style = _style(place) | ({} if len(logs[name]["step"]) <= 60 else {"marker": ""})
            axes.plot(logs[name]["tokens"], logs[name][column], label=_name(name), **style)
    axes.set_xlabel("target tokens read")
    axes.set_ylabel(label)
    if len(drawn) == 1:
        axes.set_title(_name(drawn[0]), fontsize=10)
    _legend(axes, len(drawn))
    return _svg(figure, f"Training: {label}")


def scatter(
    points: Sequence[tuple[str, float, float, bool]], x: str, y: str, label: str
) -> str | None:
    """Rows as points (name, x, y, named), x on a logarithmic scale; None for fewer than two."""
    if len(points) < 2:
        return None
    figure, axes = _figure(4.5, 3)
    for name, across, up, named in points:
        colour = SERIES[0] if named else COLOURS["inconclusive"]
        axes.plot([across], [up], "o", color=colour, ms=6)
        if named:
            spot = {"xytext": (5, 4), "textcoords": "offset points"}
            axes.annotate(_name(name), (across, up), fontsize=9, **spot)
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.15)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return _svg(figure, label)
