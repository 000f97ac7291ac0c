"""Panels on what numbers are worth: published beside measured, health, contamination, origin."""

from __future__ import annotations

from reports.calibration import Verdict, calibrate
from reports.cells import Cell, Report
from reports.formats import kinds, passes_text
from reports.panels import MISSING, Draw, Panel, Table, Value, count, words
from reports.text import interval, signed


def published(report: Report) -> Panel | None:
    """Published numbers beside the measured ones, with protocol, verdict and what n can tell."""
    found = calibrate(report)
    if not found:
        return None
    lines = tuple(_beside(report, entry) for entry in found)
    head = ["row", "suite", "task", "published, %", "measured, %", "difference", "± of n items"]
    head += ["verdict", "protocol", "source"]
    tables = [Table("Scores", head, lines)]
    told = tuple(line for entry in found if (line := _gain_beside(report, entry, found)))
    if told:
        head = ["row", "suite", "published gain", "measured gain", "95 % interval", "verdict"]
        head += ["smallest gain shown", "could these items show the published gain?"]
        tables.append(Table(f"Gains over {report.reference}, points", head, told))
    text = (
        "An untouched source, on the same questions, should land on its published value: there is "
        "no draw of questions between the two numbers. Believe no gain before the sources match.",
    )
    return Panel("Published beside measured", text, tables=tuple(tables))


def _beside(report: Report, entry: Verdict) -> tuple[Value, ...]:
    cell = _holding(report, entry)
    task = next((t for t in cell.tasks if t.title == entry.task), None)
    other = report.other(entry.row, entry.suite, entry.task)
    whole = task or other or (cell.without if _part(report, entry) else cell)
    low, high = (whole.low, whole.high) if whole else (None, None)
    sign = task.signature if task else cell.signature
    measured = difference = reach = MISSING
    if entry.measured is not None and entry.difference is not None:
        measured = Value(f"{100 * entry.measured:.2f}", entry.measured, sign)
        difference = Value(f"{100 * entry.difference:+.2f}", entry.difference, sign)
        if low is not None and high is not None:
            reach = Value(f"{50 * (high - low):.2f}", high - low, sign)
    tone = {"matched": "better", "off": "worse"}.get(entry.verdict, "gap")
    protocol = sign.split("|")[0].rpartition("@")[2]
    return (
        words(entry.row),
        words(entry.suite),
        words(entry.task),
        Value(f"{100 * entry.published:.2f}", entry.published, f"published: {entry.source}"),
        measured,
        difference,
        reach,
        words(entry.verdict, tone=tone, note=entry.reason),
        words(protocol or "–"),
        words(entry.source),
    )


def _holding(report: Report, entry: Verdict) -> Cell:
    """The cell that a published number stands beside: its suite's, or its task's where the suite
    takes no average; an empty one where nothing of it was measured.
    """
    own = report.cells.get((entry.row, entry.suite))
    alone = (
        cell
        for cell in report.parts(entry.row, entry.suite)
        if any(task.title == entry.task for task in cell.tasks)
    )
    return own or next(alone, Cell(entry.row, entry.suite))


def _part(report: Report, entry: Verdict) -> bool:
    """Whether a number is a paper's second average, or by another metric than the suite's own."""
    named = (entry.row, entry.suite, entry.source)
    return any(
        entry.task in [*list(p["averages"])[1:], *p.get("metrics", ())]
        for p in report.published
        if (p["row"], p["suite"], f"{p['paper']}, {p['table']}") == named
    )


def _gain_beside(report: Report, entry: Verdict, found: list[Verdict]) -> tuple[Value, ...] | None:
    """A published gain over the reference, of what has one here, beside the measured one."""
    cell = _holding(report, entry)
    base = next(
        (
            other
            for other in found
            if (other.row, other.suite, other.task, other.source)
            == (report.reference, entry.suite, entry.task, entry.source)
        ),
        None,
    )
    if base is None or cell.gain is None or entry.row == report.reference:
        return None
    if _part(report, entry):
        return None  # the measured gain is that of the whole, by its own metric
    if cell.suite == entry.suite and entry.task in {task.title for task in cell.tasks}:
        return None  # of a task; the report's gains are of suites
    column = next(c for c in report.columns if c.name == cell.suite)
    gain, printed = cell.gain, entry.published - base.published
    able = "no item differs" if gain.detectable <= 0 else "yes"
    if gain.detectable > abs(printed):
        able = "no: it is below what they show with 80 % power"
    shown = f"{100 * gain.detectable:.1f}" if gain.detectable > 0 else "–"
    return (
        words(entry.row),
        words(f"{entry.suite}, {entry.task}"),
        Value(f"{100 * printed:+.2f}", printed, f"published: {entry.source}"),
        Value(signed(gain.value, column), gain.value, cell.signature),
        Value(interval(gain.low, gain.high, column, with_sign=True) or "–", gain.low),
        words(gain.verdict, tone=gain.verdict),
        Value(shown, gain.detectable or None, cell.signature),
        words(able),
    )


def health(report: Report) -> Panel | None:
    """How many items went otherwise than meant, by row and suite; a dash where nobody counted."""
    lines = []
    shown = kinds(report)
    counted = [cell for cell in report.cells.values() if cell.health]
    if not counted:
        return None
    for cell in counted:
        counts = dict(cell.health)
        if not any(counts.values()):
            continue
        line = [words(cell.row), words(cell.suite), _items(cell)]
        for kind in shown:
            found = counts.get(kind)
            if found is None:
                line.append(MISSING)
                continue
            share = f"{100 * found / cell.n:.1f} %" if found and cell.n else ""
            tone = "worse" if found else ""
            line.append(Value(f"{found:,}", found, cell.signature, tone=tone, note=share))
        lines.append(tuple(line))
    if not lines:
        return Panel("Health", ("Every item of every row went as meant.",))
    text = (
        "An item may count in two columns. Only what could not be judged is left out of a score; "
        "the rest counts as it was answered.",
    )
    head = ["row", "suite", "items", *shown.values()]
    table = Table("Items that did not go as meant", head, tuple(lines))
    return Panel("Health", text, tables=(table,))


def programs(report: Report) -> Panel | None:
    """How many programs ended how, by row and suite."""
    cells = [cell for cell in report.cells.values() if cell.programs]
    if not cells:
        return None
    kinds = list(dict.fromkeys(kind for cell in cells for kind, _ in cell.programs))
    lines = []
    for cell in cells:
        counts = dict(cell.programs)
        shown = [count(counts.get(kind), signature=cell.signature) for kind in kinds]
        lines.append((words(cell.row), words(cell.suite), *shown))
    head = ["row", "suite", *(kind.replace("_", " ") for kind in kinds)]
    text = tuple(f"{c.row} on {c.suite}: {passes_text(c)}." for c in cells if c.passes)
    return Panel("How programs ended", text, tables=(Table("Programs", head, tuple(lines)),))


def _items(cell: Cell) -> Value:
    whole = f"{cell.n:,} of {cell.n_total:,}" if cell.partial else f"{cell.n:,}"
    return Value(whole, cell.n, cell.signature)


def contamination(report: Report) -> Panel | None:
    """How many questions share a long run of words with what the rows were trained on."""
    from reports.statistics import wilson

    lines = []
    for entry in report.extra.get("contamination", ()):
        told = entry["items"] - entry["short"]
        share = interval_text = MISSING
        if told:
            low, high = wilson(entry["found"], told)
            value = entry["found"] / told
            tone = "worse" if entry["found"] else ""
            share = Value(f"{100 * value:.2f}", value, tone=tone)
            interval_text = Value(f"[{100 * low:.2f}, {100 * high:.2f}]", low)
        name = words(entry["suite"])
        counted = [count(entry[key]) for key in ("items", "short", "found")]
        lines.append((name, *counted, share, interval_text, count(entry["corpus_words"])))
    if not lines:
        return None
    n = report.extra["contamination"][0]["n"]
    text = (
        f"A question counts if any {n} words of it in a row (lower case, punctuation aside) stand "
        f"in the text that the rows of this report were trained on. What has fewer than {n} words "
        "cannot tell. What the sources had read before is not known.",
    )
    head = ["suite", "items", f"under {n} words", "with an overlap", "share, %", "95 % interval"]
    table = Table("Questions in the corpus", [*head, "words of the corpus"], tuple(lines))
    return Panel("Contamination", text, tables=(table,))


def provenance(report: Report) -> Panel | None:
    """What made or reported these numbers: machine, versions, recipe, identities, signatures."""
    facts = report.facts
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    text = [
        f"{facts.get('machine')} · {facts.get('created')} · commit {facts.get('commit') or '–'}",
        packages,
    ]
    if report.extra.get("seed") is not None:
        text.append(f"Seed {report.extra['seed']}.")
    if report.overrides:
        text.append(f"Overrides: {' '.join(report.overrides)}")
    code = [("Recipe as written", report.recipe_yaml)]
    if report.extra.get("resolved"):
        code.append(("Recipe with every default", report.extra["resolved"]))
    signatures = [cell.signature for cell in report.cells.values() if cell.signature]
    code.append(("Signatures of all scores", "\n".join(signatures)))
    lines = [
        (words(row["name"]), words(row["kind"]), words(row["summary"]), words(row["identity"]))
        for row in report.rows
    ]
    table = Table("Rows", ("row", "kind", "how it is made", "identity"), tuple(lines))
    return Panel("Provenance", tuple(text), tables=(table,), code=tuple(code))


PANELS: dict[str, Draw] = {
    "published": published,
    "health": health,
    "programs": programs,
    "contamination": contamination,
}
LAST: dict[str, Draw] = {"provenance": provenance}
