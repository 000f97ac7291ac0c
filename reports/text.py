"""Numbers and names as text: percent and rounding happen here and nowhere before."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reports.cells import Column


def number(value: float | None, column: Column) -> str:
    """A score: percent with one decimal, or bits per byte with four."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if column.unit == "%" else f"{value:.4f}"


def signed(value: float | None, column: Column) -> str:
    """A difference in the same unit, with its sign."""
    if value is None:
        return "–"
    return f"{100 * value:+.1f}" if column.unit == "%" else f"{value:+.4f}"


def interval(low: float | None, high: float | None, column: Column, with_sign: bool = False) -> str:
    """[low, high], or nothing where no interval can be given."""
    if low is None or high is None:
        return ""
    show = signed if with_sign else number
    return f"[{show(low, column)}, {show(high, column)}]"


def escape(text: str) -> str:
    """Text inside a Markdown table; names may hold anything. What does not print is a blank."""
    text = "".join(c if c.isprintable() else " " for c in text)
    for mark, said in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(mark, said)
    for mark in ("\\", "|", "`", "*", "_", "[", "]"):
        text = text.replace(mark, "\\" + mark)
    return text


def code(text: str) -> str:
    """Text between backticks in Markdown: nothing in it ends them or the line."""
    return "`" + "".join(c if c.isprintable() else " " for c in text.replace("`", "")) + "`"
