"""Read a gate file strictly, as a recipe is read: all mistakes in one message, with close matches.

rules:
  - {suite: commonsense, kind: non_inferiority, margin: 0.02}
  - {suite: bbh, kind: no_harm, margin: 0.05, tasks: [bbh_navigate]}
  - {suite: bits_per_byte, kind: superiority}
alpha: 0.05     # may be left out
power: 0.8      # may be left out
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fusion.errors import RecipeError
from harness.checks import close, not_right
from harness.recipe import _Loader

if TYPE_CHECKING:
    from reports.gate import Gate
    from reports.records import Run

Pairs = Sequence[tuple["Run", "Run"]]


def load(path: Path, pairs: Pairs) -> Gate:
    """The gate in a file, for these runs. RecipeError lists every mistake with its path."""
    from pydantic import ValidationError

    from reports.gate import Gate

    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a gate is a mapping with keys {', '.join(Gate.model_fields)}")
    problems, gate = [], None
    try:
        gate = Gate.model_validate(raw)
    except ValidationError as error:
        problems += [_explain(e) for e in error.errors()]
    problems += _unknown(raw, pairs)
    if problems or gate is None:
        width = max(len(place) for place, _ in problems)
        lines = [f"  {place:<{width}}  {message}" for place, message in problems]
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise RecipeError("\n".join([f"{path}: {count}", *lines]))
    return gate


def _place(location: Sequence[Any]) -> str:
    parts = [f"[{p}]" if isinstance(p, int) else f".{p}" for p in location]
    return "".join(parts).removeprefix(".")


def _explain(error: Any) -> tuple[str, str]:
    from reports.gate import Gate, Rule

    location, kind, found = error["loc"], error["type"], error["input"]
    fields = (Rule if len(location) > 2 else Gate).model_fields
    if kind == "extra_forbidden":
        hint = close(str(location[-1]), list(fields))
        return _place(location), f"unknown key; allowed: {', '.join(fields)}{hint}"
    if kind == "missing":
        return _place(location), f"missing: {fields[str(location[-1])].description}"
    if kind == "literal_error":
        return _place(location), f"{found!r} is unknown; known: {error['ctx']['expected']}"
    if kind == "value_error":
        return _place(location), error["msg"].removeprefix("Value error, ")
    return _place(location), not_right(error)


def _unknown(raw: dict, pairs: Pairs) -> Iterator[tuple[str, str]]:
    """Suites and tasks that the two rows do not both have."""
    known = {base.manifest["suite"]: base.manifest for base, _ in pairs}
    rules = raw.get("rules")
    for number, rule in enumerate(rules if isinstance(rules, list) else []):
        suite = rule.get("suite") if isinstance(rule, dict) else None
        if not isinstance(suite, str):
            continue
        if suite not in known:
            hint = close(suite, list(known))
            listed = ", ".join(known)
            what = f"'{suite}' is no suite that both rows have; they have {listed}{hint}"
            yield f"rules[{number}].suite", what
            continue
        names = [task["task"] for task in known[suite]["tasks"]]
        tasks = rule.get("tasks")
        for place, task in enumerate(tasks if isinstance(tasks, list) else []):
            if task not in names:
                hint = close(str(task), names)
                at = f"rules[{number}].tasks[{place}]"
                yield at, f"'{task}' is no task of {suite}; tasks: {', '.join(names)}{hint}"
