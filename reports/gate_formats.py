"""A gate's result for people and for CI: Markdown with power before verdict, and JUnit XML."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from reports.cells import Column
from reports.compare_formats import left_out, shown
from reports.formats import interval, number, signed
from reports.gate import Check, Result


def _column(check: Check) -> Column:
    return Column(check.suite, check.suite, True, check.unit)


def _unit(check: Check) -> str:
    return "points" if check.unit else "bits per byte"


def asked(check: Check) -> str:
    """The claim in words."""
    if check.margin is None:
        return "is better"
    return f"loses at most {number(check.margin, _column(check))} {_unit(check)}"


def power(check: Check, wanted: float) -> str:
    """What so many items with so many differing ones can show, whatever they do show."""
    d, kind = check.difference, _column(check)
    least = f"{number(check.needed, kind)} {_unit(check)}"
    if check.margin is None:
        return f"a true gain of {least} passes with {wanted:.0%} chance"
    enough = "" if check.power >= wanted else ": too few items for this margin"
    least = f"{wanted:.0%} needs a margin of {least}"
    floor = " (no item differs; reckoned as if one of each task did)"
    nothing = floor if not d.better + d.worse else ""
    return f"an equal row passes with {check.power:.0%} chance; {least}{enough}{nothing}"


def found(check: Check) -> str:
    """Gain, bounds and counts."""
    d, kind = check.difference, _column(check)
    bounds = interval(check.low, check.high, kind, with_sign=True)
    span = (
        f"one-sided bounds {bounds}"
        if check.margin is not None and bounds
        else f"p {d.p_value:.3g}"
    )
    return f"{signed(d.gain, kind)} ({span}; +{d.better} −{d.worse} of {d.n})"


def markdown(result: Result, gaps: Sequence[str] = ()) -> str:
    """The summary: what could be shown, then what was, and which suites are not judged."""
    lines = [f"# Gate: {shown(result.candidate)} against {shown(result.base)}: {result.outcome}"]
    lines += ["", "## What these items can show", "", "| claim | power |", "| --- | --- |"]
    for check in result.checks:
        claim = f"{shown(check.name)} {asked(check)}"
        lines.append(f"| {claim} | {power(check, result.power)} |")
    lines += ["", "## Verdict", "", "| claim | found | outcome |", "| --- | --- | --- |"]
    for check in result.checks:
        claim = f"{shown(check.name)} {asked(check)}"
        lines.append(f"| {claim} | {found(check)} | {check.outcome} |")
    lines += [
        "",
        f"The gate passes if every claim does, each at α = {result.alpha:g} (one-sided; "
        f"superiority two-sided); it fails at α / {len(result.checks)}, the number of claims. "
        "All else is inconclusive: measure more items, or widen the margin before looking.",
        *left_out(gaps),
    ]
    return "\n".join(lines) + "\n"


def junit(result: Result, gaps: Sequence[str] = ()) -> str:
    """JUnit XML, one test a claim; an inconclusive one is skipped, as is what is not judged."""
    outcomes = [check.outcome for check in result.checks]
    suite = ET.Element(
        "testsuite",
        name=_text(f"kfuse gate: {result.candidate} against {result.base}"),
        tests=str(len(outcomes) + len(gaps)),
        failures=str(outcomes.count("fail")),
        errors="0",
        skipped=str(outcomes.count("inconclusive") + len(gaps)),
    )
    for check in result.checks:
        name = _text(f"{check.name} {asked(check)}")
        case = ET.SubElement(suite, "testcase", classname=f"kfuse.{check.kind}", name=name)
        message = _text(f"{found(check)}; {power(check, result.power)}")
        if check.outcome == "fail":
            ET.SubElement(case, "failure", message=message).text = message
        elif check.outcome == "inconclusive":
            ET.SubElement(case, "skipped", message=f"inconclusive: {message}")
        else:
            ET.SubElement(case, "system-out").text = message
    for gap in gaps:
        name = _text(gap.partition(":")[0])
        case = ET.SubElement(suite, "testcase", classname="kfuse.not_judged", name=name)
        ET.SubElement(case, "skipped", message=_text(gap))
    ET.indent(suite)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suite, encoding="unicode") + "\n"
    )


def _text(text: str) -> str:
    """XML knows no control characters, not even escaped."""
    return "".join(c if c.isprintable() else "�" for c in text)
