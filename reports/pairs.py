"""The runs that two names stand for: folders, or rows of a report, suite by suite."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from reports.compare import NotComparable, Unscored, opened
from reports.records import Run, apart, read_json
from reports.signature import differences


def open_pairs(
    base: str, candidate: str, home: Path, report: str | None = None
) -> tuple[list[tuple[Run, Run]], list[Unscored]]:
    """The runs that two names stand for, suite by suite in the report's order, and why other suites
    of the report have none.

    A name is a run's folder, or a row of a report in `home`. FileNotFoundError says
    what is missing, NotComparable what cannot be read, or that the rows share no measured suite.
    """
    folders = [Path(base), Path(candidate)]
    if all(folder.is_dir() for folder in folders) and report is None:
        return _apart([(opened(Run.open, folders[0]), opened(Run.open, folders[1]))]), []
    index = find_report([base, candidate], home, report)
    cells = opened(read_json, index)["cells"]
    root = index.resolve().parent.parent.parent
    pairs = []
    gaps = []
    for suite in cells[base]:
        found = {row: cells[row][suite] for row in (base, candidate)}
        lacking = {row: cell["reason"] for row, cell in found.items() if "run" not in cell}
        if lacking:
            why = "; ".join(f"{row}: {reason}" for row, reason in lacking.items())
            gaps.append(Unscored(f"{suite}: {why}", some=len(set(lacking)) < len(set(found))))
        else:
            one, two = (
                opened(Run.open, root / cells[row][suite]["run"]) for row in (base, candidate)
            )
            pairs.append((one, two))
    if not pairs:
        reasons = "; ".join(map(str, gaps))
        raise NotComparable(f"{base} and {candidate} share no measured suite: {reasons}")
    return _apart(pairs), gaps


def _apart(pairs: list[tuple[Run, Run]]) -> list[tuple[Run, Run]]:
    """Tasks of suites without an average as pairs of their own; unlike runs as they are."""
    out = []
    for base, candidate in pairs:
        same = not differences(candidate.manifest, base.manifest)
        out += (
            list(zip(apart(base), apart(candidate), strict=True)) if same else [(base, candidate)]
        )
    return out


def find_report(rows: list[str], home: Path, report: str | None = None) -> Path:
    """The index.json that has these rows: a path, a report's name, or the only one that has them.

    FileNotFoundError lists what is there.
    """
    given = Path(report) if report else None
    if given and given.exists():
        found = [given if given.is_file() else given / "index.json"]
    else:
        found = sorted((home / "reports").glob("*/index.json"))
    known = {path: list(opened(read_json, path).get("cells", {})) for path in found}
    if report and not (given and given.exists()):
        named = [p for p in found if report in (p.parent.name, p.parent.name.rpartition("-")[0])]
        known = {path: known[path] for path in named}
        if not known:
            there = ", ".join(p.parent.name for p in found) or "none"
            raise FileNotFoundError(f"{report}: no such report in {home}/reports; there: {there}")
    fitting = [path for path, names in known.items() if set(rows) <= set(names)]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(f"{p.parent.name}: {', '.join(names)}" for p, names in known.items())
    wanted = " and ".join(dict.fromkeys(rows))
    if not fitting:
        every = list(dict.fromkeys(name for names in known.values() for name in names))
        near = [get_close_matches(row, every, n=1) for row in rows if row not in every]
        hint = f" ({' and '.join(match[0] for match in near)}?)" if near and all(near) else ""
        raise FileNotFoundError(
            f"{wanted}: no run folder, and no report in {home}/reports has such rows"
            f"{f'; rows of {listed}' if listed else '; make one with `kfuse report RECIPE`'}{hint}"
        )
    raise FileNotFoundError(
        f"{wanted}: {len(fitting)} reports have these rows; choose one with --report: "
        + ", ".join(path.parent.name for path in fitting)
    )
