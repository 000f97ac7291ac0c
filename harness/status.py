"""`kfuse status`: every job of a recipe, what runs where, what is left and until when.

Read from the store alone, so it works in another terminal, on another machine that shares the
store, and after a crash. A job is a step of the plan; a build is done once, a measurement once for
each row and suite.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.progress import lives, signs
from harness.store import read_manifest

if TYPE_CHECKING:
    from rich.table import Table

    from harness.steps import Plan, Step

State = Literal["done", "running", "lost", "failed", "waiting", "ready"]


@dataclass(frozen=True, slots=True)
class Job:
    """A step and how it stands; seconds: what it took, or is expected to (None: not known)."""

    step: Step
    state: State
    detail: str
    seconds: float | None


def jobs(plan: Plan, steps: Sequence[Step]) -> list[Job]:
    """How each step stands, in the order in which `kfuse run` carries them out.

    A step that is not done is expected to take what finished ones like it took on average: of its
    kind, a measurement of its suite; while none is finished, what one that is running will take by
    how far it is.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for sign in signs(plan.home):
        found.setdefault(sign["folder"], []).append(sign)
    took: dict[tuple[str, str], list[float]] = {}
    manifests = {step.identity: read_manifest(step.folder) for step in steps}
    for step in steps:
        seconds = ((manifests[step.identity] or {}).get("cost") or {}).get("seconds")
        if seconds is not None:
            took.setdefault(_like(step), []).append(float(seconds))
    for step in steps:
        if manifests[step.identity] is None and not took.get(_like(step)):
            living = [sign for sign in found.get(step.folder.name, ()) if lives(sign)]
            if any(sign.get("done") for sign in living):
                took[_like(step)] = [_spent(living) + (_left(living, None) or 0.0)]
    out = []
    for step in steps:
        known = took.get(_like(step), [])
        expected = sum(known) / len(known) if known else None
        out.append(_job(plan, step, manifests[step.identity], found, expected))
    return out


def _like(step: Step) -> tuple[str, str]:
    return step.kind, step.name if step.kind == "evaluate" else ""


def _job(
    plan: Plan,
    step: Step,
    manifest: dict[str, Any] | None,
    signs: dict[str, list[dict[str, Any]]],
    expected: float | None,
) -> Job:
    if manifest:
        seconds = (manifest.get("cost") or {}).get("seconds")
        return Job(step, "done", "", seconds)
    found = signs.get(step.folder.name, [])
    living = [sign for sign in found if lives(sign)]
    if living:
        return Job(step, "running", "; ".join(map(_where, living)), _left(living, expected))
    if found:
        return Job(step, "lost", f"{_where(found[-1])}; `kfuse run` goes on from there", expected)
    if step.failure:
        return Job(step, "failed", step.failure, expected)
    missing = [plan.steps[n] for n in needs(plan, step) if not plan.steps[n].done]
    if missing:
        names = dict.fromkeys(f"{need.kind} {need.name}" for need in missing)
        return Job(step, "waiting", f"for {', '.join(names)}", expected)
    return Job(step, "ready", "begun before" if step.started else "", expected)


def needs(plan: Plan, step: Step) -> list[str]:
    """Identities of the steps that a step stands on; an ensemble's own name none of its members."""
    from harness.build import needed

    if step.kind == "evaluate" and plan.folders[step.rows[0]] is None:
        return sorted(needed(plan, step.rows[:1]) & set(plan.steps))
    return [need for need in step.needs if need in plan.steps]


def _where(sign: dict[str, Any]) -> str:
    minutes = (float(sign["seen"]) - float(sign["since"])) / 60
    far = f"{sign['done']} of {sign['total']}, " if sign.get("total") else ""
    return f"{far}{minutes:.0f} min on {sign['host']} (process {sign['pid']})"


def _spent(signs: Sequence[dict[str, Any]]) -> float:
    return max(float(s["seen"]) - float(s["since"]) + s["age"] for s in signs)


def _left(signs: Sequence[dict[str, Any]], expected: float | None) -> float | None:
    """Seconds until running work is over: by how far it is, else by what like work took."""
    spent = _spent(signs)
    done = sum(sign.get("done", 0) for sign in signs)
    if done:
        total = sum(sign.get("total", 0) for sign in signs)
        return spent * (total - done) / done
    return None if expected is None else max(0.0, expected - spent)


def summary(found: Sequence[Job]) -> str:
    """What is left and, one job after the other, for how long."""
    left = [job for job in found if job.state != "done"]
    counts = {state: sum(job.state == state for job in found) for state in State.__args__}  # type: ignore[attr-defined]
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    if not left:
        return f"{said}: all is built and measured"
    known = [job.seconds for job in left if job.seconds is not None]
    unknown = len(left) - len(known)
    parts = [f"{len(left)} of {len(found)} jobs are left ({said})"]
    if known:
        end = time.strftime("%H:%M", time.localtime(time.time() + sum(known)))
        parts.append(f"about {_span(sum(known))}, until {end}, one after the other")
    if unknown:
        parts.append(f"{unknown} of a kind that has not been done yet, and not counted")
    return "; ".join(parts)


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def table(found: Sequence[Job]) -> Table:
    """Jobs as lines: what, for which rows, how it stands, where or why."""
    from rich.table import Table
    from rich.text import Text

    out = Table(caption=summary(found), caption_justify="left")
    for column in ("job", "rows", "state", "", "seconds"):
        out.add_column(column)
    for job in found:
        step = job.step
        seconds = f"{job.seconds:.0f}" if job.state == "done" and job.seconds is not None else ""
        said = (f"{step.kind} {step.name}", ", ".join(step.rows), job.state, job.detail, seconds)
        out.add_row(*map(Text, said))  # names hold brackets
    return out


def watch(look: Callable[[], list[Job]], every: float = 2.0) -> Iterator[list[Job]]:
    """Look again and again until all is done."""
    while True:
        found = look()
        yield found
        if all(job.state == "done" for job in found):
            return
        time.sleep(every)


def status(reference: str, overrides: Sequence[str], only: Sequence[str], live: bool) -> None:
    """Print how a recipe's jobs stand; live: in place, until all are done or one interrupts."""
    from rich.console import Console
    from rich.live import Live

    from harness.plan import plan
    from harness.recipe import load
    from harness.run import asked
    from harness.store import home

    loaded = load(reference, overrides)

    def look() -> list[Job]:
        planned = plan(loaded.recipe, home())
        return jobs(planned, asked(planned, loaded, only))

    console = Console() if Console().is_terminal else Console(width=150)
    if not live or not console.is_terminal:
        console.print(table(look()))
        return
    with Live(console=console, auto_refresh=False) as view:
        for found in watch(look):
            view.update(table(found), refresh=True)
