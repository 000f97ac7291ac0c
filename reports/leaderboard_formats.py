"""A leaderboard as Markdown, CSV, LaTeX (booktabs), HTML and JSON; text is escaped for each.

Add a format: a function of boards and its line in FORMATS at the foot.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from reports.cells import Column
from reports.compare_formats import shown
from reports.formats import interval, number
from reports.leaderboard import FORMULA, Board, Line
from reports.panels import Table, Value, words
from reports.text import escape

Boards = Sequence[Board]
HEAD = ("rank", "row", "score", "95 % interval", "above chance", "group", "n", "source")
GROUPS = "rows that share a letter are not told apart (paired permutation tests, Holm, 5 %)"
LATIN = "\u00ff"  # the last character that the usual fonts are sure to have
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "–": "--", "—": "---", "−": "$-$", "…": r"\ldots{}", "“": "``", "”": "''", "‘": "`", "’": "'",
    "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", "-": "{-}",
}  # fmt: skip


def _column(board: Board) -> Column:
    return Column(board.suite, board.suite, board.higher_is_better, board.unit)


def _rank(line: Line) -> str:
    if line.rank_low is None or line.rank_high is None:
        return str(line.rank)
    return f"{line.rank} [{line.rank_low}, {line.rank_high}]"


def _cells(board: Board, line: Line) -> list[str]:
    kind = _column(board)
    above = "–" if line.normalised is None else f"{line.normalised:.3f}"
    return [
        _rank(line), line.row, number(line.score, kind), interval(line.low, line.high, kind),
        above, line.group, str(line.n or "–"), line.source,
    ]  # fmt: skip


def _title(board: Board) -> str:
    unit = "%" if board.unit else "as measured"
    way = "higher" if board.higher_is_better else "lower"
    return f"{board.suite} ({unit}, {way} is better), protocol {board.protocol}"


def _notes(board: Board) -> list[str]:
    return [note for note in (board.partial, board.note) if note]


def markdown(boards: Boards) -> str:
    """One table a suite and protocol."""
    lines = ["# Leaderboard", "", f"Above chance: {FORMULA}. Groups: {GROUPS}.", ""]
    for board in boards:
        lines += [f"## {escape(_title(board))}", "", f"| {' | '.join(HEAD)} |"]
        lines.append("|" + " --- |" * len(HEAD))
        for line in board.lines:
            lines.append(f"| {' | '.join(shown(cell) for cell in _cells(board, line))} |")
        lines += ["", *(f"- {escape(note)}" for note in _notes(board)), ""]
    return "\n".join(lines).rstrip() + "\n"


def comma_separated(boards: Boards) -> str:
    """One line a row and column; fractions, full precision; empty where there is no number."""
    out = io.StringIO()
    names = ["suite", "protocol", *Line.__dataclass_fields__]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for board in boards:
        for line in board.lines:
            known = {"suite": board.suite, "protocol": board.protocol}
            writer.writerow(known | asdict(line) | {"n": line.n or None})
    return out.getvalue()


def machine_readable(boards: Boards) -> str:
    """The boards as JSON, with the formula."""
    content = {"above_chance": FORMULA, "groups": GROUPS, "boards": [asdict(b) for b in boards]}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def tex(text: str) -> str:
    """Text that LaTeX prints as it is, pdflatex, too: what its fonts lack is named [U+540D]."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    known = {c: _LATEX.get(c, c if c <= LATIN else f"[U+{ord(c):04X}]") for c in set(printable)}
    return "".join(known[c] for c in printable)


def latex(boards: Boards) -> str:
    """Long tables with booktabs rules; \\usepackage{booktabs,longtable} in the preamble."""
    parts = ["% \\usepackage{booktabs,longtable}; \\usepackage[T1]{fontenc}"]
    for board in boards:
        head = " & ".join(tex(name) for name in HEAD)
        parts += [
            f"\\begin{{longtable}}{{{'l' * len(HEAD)}}}",
            f"\\caption{{{tex(_title(board))}}} \\\\",
            "\\toprule",
            f"{head} \\\\",
            "\\midrule",
            "\\endhead",
        ]
        for line in board.lines:
            # Braces: a bracket at the start of a line would be read as an option of the line break.
            parts.append("{}" + " & ".join(tex(cell) for cell in _cells(board, line)) + " \\\\")
        parts += ["\\bottomrule", "\\end{longtable}"]
        parts += [tex(f"{note}.") + "\n" for note in _notes(board)]
    parts.append(tex(f"Above chance: {FORMULA}. Groups: {GROUPS}."))
    return "\n".join(parts) + "\n"


def html(boards: Boards) -> str:
    """One page with a sortable table a suite and protocol."""
    from reports.html import render
    from reports.panels import Panel

    panels = {}
    for place, board in enumerate(boards):
        lines = tuple(_places(board, line) for line in board.lines)
        table = Table(_title(board), HEAD, lines)
        panels[f"board-{place}"] = Panel(board.suite, tuple(_notes(board)), tables=(table,))
    return render("Leaderboard", f"Above chance: {FORMULA}. Groups: {GROUPS}.", panels)


def _places(board: Board, line: Line) -> tuple[Value, ...]:
    """A line's cells with what they are sorted by; the row's name is the header."""
    rank, row, score, span, above, group, n, source = _cells(board, line)
    return (
        Value(rank, float(line.rank)),
        words(row),
        Value(score, line.score, f"{board.suite} {board.protocol} {line.row}"),
        Value(span, line.low),
        Value(above, line.normalised),
        words(group),
        Value(n, float(line.n) if line.n else None),
        words(source),
    )


FORMATS: dict[str, Callable[[Boards], str]] = {
    "markdown": markdown,
    "csv": comma_separated,
    "latex": latex,
    "html": html,
    "json": machine_readable,
}
