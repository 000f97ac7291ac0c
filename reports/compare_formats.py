"""A comparison of two rows as text: Markdown for reading, CSV of the items that differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reports.cells import Column
from reports.compare import Comparison, Difference
from reports.formats import SIGN, _escape, interval, number, signed

WIDTH = 90  # characters of an answer in a table


def column(comparison: Comparison) -> Column:
    """How the numbers of a comparison are shown."""
    return Column(comparison.suite, comparison.suite, True, comparison.unit)


def shown(text: object, width: int = WIDTH) -> str:
    """Text of a model or a task on one line: no control characters, shortened in the middle."""
    quoted = json.dumps(str(text), ensure_ascii=False)[1:-1]
    quoted = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in quoted)
    if len(quoted) > width:
        quoted = f"{quoted[: width // 2]} … {quoted[-width // 2 :]}"
    return _escape(quoted)


def probability(p: float) -> str:
    """A p-value with three decimals, never as zero."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _line(difference: Difference, kind: Column) -> str:
    d = difference
    span = interval(d.low, d.high, kind, with_sign=True) or "none"
    least = number(d.detectable, kind) if d.detectable is not None else "unknown"
    cells = [
        shown(d.name), str(d.n), number(d.base, kind), number(d.candidate, kind),
        f"+{d.better} −{d.worse}", signed(d.gain, kind), f"{span} {d.interval}",
        f"{probability(d.p_value)} {d.test}", probability(d.adjusted), least, d.verdict,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| what | n | base | candidate | items better, worse | gain | 95 % interval | p | p (Holm) "
    "| shown with 80 % power | verdict |\n|" + " --- |" * 11
)


def left_out(reasons: Sequence[str]) -> list[str]:
    """Lines that say which suites are not compared."""
    if not reasons:
        return []
    return ["", "## Not compared", "", *(f"- {shown(reason, 400)}" for reason in reasons)]


def markdown(comparisons: Sequence[Comparison], items: int = 20, gaps: Sequence[str] = ()) -> str:
    """Suites, their tasks, up to `items` differing items of each suite, and what is left out."""
    first = comparisons[0]
    lines = [f"# {shown(first.candidate)} against {shown(first.base)}", ""]
    lines.append(f"{SIGN}. Scores that are fractions are shown in percent.")
    margin = first.total.margin
    if margin is not None:
        lines.append(f"Equivalent: the whole interval is within ±{margin:g} (a fraction, or bits).")
    for comparison in comparisons:
        kind = column(comparison)
        lines += ["", f"## {shown(comparison.suite)}", "", HEAD]
        lines.append(_line(comparison.total, kind))
        if len(comparison.tasks) > 1:
            lines += [_line(task, kind) for task in comparison.tasks]
        n = comparison.total.n
        lines.append("")
        if n < comparison.n_total:
            lines.append(f"Partial: {n} of {comparison.n_total} items were scored on both sides.")
        if comparison.unscored:
            lines.append(f"{comparison.unscored} items have no score on at least one side.")
        lines += _items(comparison, items)
    lines += left_out(gaps)
    return "\n".join(lines) + "\n"


def _items(comparison: Comparison, limit: int) -> list[str]:
    frame = comparison.items
    if frame is None or frame.empty:
        return ["The rows agree on every item."]
    lines = [f"{len(frame)} of {comparison.total.n} items differ."]
    if not limit:
        return lines
    if len(frame) > limit:
        lines[0] += f" The first {limit}:"
    lines += ["", "| item | prompt | gold | base | candidate |", "| --- | --- | --- | --- | --- |"]
    for item in frame.head(limit).to_dict("records"):
        lines.append(f"| {' | '.join(_cells(item))} |")
    return lines


def _cells(item: Mapping[Any, Any]) -> list[str]:
    cells = [shown(f"{item['task']} {item['doc_id']}"), f"`{item['prompt_hash']}`"]
    cells.append(shown(item.get("gold", "")))
    for side in ("base", "candidate"):
        value, outcome = item[f"value_{side}"], item[f"outcome_{side}"]
        cells.append(f"{value:.4g} {shown(outcome)}: {shown(item[f'answer_{side}'])}")
    return cells


def comma_separated(comparisons: Sequence[Comparison]) -> str:
    """Every differing item of every suite, answers whole; a header alone if there is none."""
    import pandas as pd

    frames = [c.items.assign(suite=c.suite) for c in comparisons if c.items is not None]
    out = pd.concat(frames, ignore_index=True)
    text: str = out[["suite", *[c for c in out if c != "suite"]]].to_csv(index=False)
    return text
