"""The steps of a plan, each one folder, and the plan that holds them in an order that works."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusion.mergekit import reshapes
from harness.recipe import Recipe
from harness.store import identity, read_manifest

# Raised by hand when the same input gives another output.
VERSIONS = {
    "convert": 1,
    "pack": 4,
    "capture": 2,
    "map": 2,
    "train": 2,
    "budget": 1,
    "statistics": 1,
    "merge": 5,
    "evaluate": 3,
}


@dataclass(frozen=True)
class Step:
    """One folder to be made: what kind, for which rows, from what, and about how large."""

    kind: str  # fetch, pack, capture, map, train, statistics, merge, evaluate
    name: str
    folder: Path
    identity: str
    content: dict[str, Any]
    needs: tuple[str, ...] = ()  # identities of steps
    rows: tuple[str, ...] = ()
    tokens: int = 0
    disk: int = 0
    judge: str | None = None  # who is to grade the answers, where a suite is judged

    @property
    def done(self) -> bool:
        """Whether the folder is finished, and judged by who is to judge it."""
        found = read_manifest(self.folder)
        return found is not None and (found.get("judge") or {}).get("identity") == self.judge

    @property
    def started(self) -> bool:
        """Whether there is work to go on from."""
        return self.folder.exists() and not self.done

    @property
    def failure(self) -> str | None:
        """Why the last try failed, if it did."""
        try:
            return str(json.loads((self.folder / "failed.json").read_text())["reason"])
        except (OSError, ValueError, KeyError):
            return None


@dataclass
class Plan:
    """Steps in an order that works, and where each row's model is or will be."""

    recipe: Recipe
    home: Path
    steps: dict[str, Step] = field(default_factory=dict)  # by identity
    identities: dict[str, str] = field(default_factory=dict)  # by row
    folders: dict[str, Path | None] = field(default_factory=dict)  # by row; None for ensembles
    summaries: dict[str, str] = field(default_factory=dict)

    def add(self, step: Step) -> Step:
        """Keep a step once, whichever rows need it; rows that are one model share theirs."""
        known = self.steps.get(step.identity)
        if known:
            rows = tuple(dict.fromkeys([*known.rows, *step.rows]))
            step = Step(**{**known.__dict__, "rows": rows})
        self.steps[step.identity] = step
        return step

    def evaluations(self, row: str) -> list[Step]:
        """The measurements of a row, in the recipe's order of suites."""
        return [s for s in self.steps.values() if s.kind == "evaluate" and row in s.rows]

    def twins(self, row: str) -> list[str]:
        """The rows that are the same model as this one, itself included: they share a folder."""
        return [other for other, key in self.identities.items() if key == self.identities[row]]

    def builds(self) -> list[Step]:
        """Everything but measurements."""
        return [s for s in self.steps.values() if s.kind != "evaluate"]


def moved(plan: Plan, home: Path) -> Plan:
    """A plan of another machine, whose folder of the store lies elsewhere, as this machine's."""

    def here(path: Path) -> Path:
        return home / path.relative_to(plan.home) if path.is_relative_to(plan.home) else path

    steps = {key: replace(step, folder=here(step.folder)) for key, step in plan.steps.items()}
    folders = {row: path and here(path) for row, path in plan.folders.items()}
    return replace(plan, home=home, steps=steps, folders=folders)


def root(recipe: Recipe, row: str) -> str:
    """The row whose tokenizer and shape a row carries: a source, or a merge that has its own."""
    while row in recipe.variants:
        variant = recipe.variants[row]
        if variant.train:
            row = variant.train.init
        elif variant.merge and not reshapes(variant.merge.mergekit):
            row = variant.merge.base or variant.merge.inputs[0]
        elif variant.repeat:
            row = variant.repeat.row
        else:
            break
    return row


def place(home: Path, room: str, name: str, key: str) -> Path:
    """The folder of an identity: an existing one whatever its name, so that recipes share."""
    room_path = home / room
    found = sorted(room_path.glob(f"*-{key[:8]}")) if room_path.is_dir() else []
    safe = "".join(c if c.isalnum() or c in "_.@=-" else "_" for c in name)
    return next((f for f in found if read_manifest(f)), room_path / f"{safe}-{key[:8]}")


def planned_step(
    out: Plan,
    kind: str,
    name: str,
    content: dict,
    needs: tuple[str, ...],
    for_row: str,
    *,
    row: str | None = None,
    tokens: int = 0,
    disk: int = 0,
) -> Step:
    key = identity({kind: content})
    folder = place(out.home, "distributions", f"{kind}-{name}", key)
    extra = {"row": row} if row else {}
    return Step(kind, name, folder, key, content | extra, needs, (for_row,), tokens, disk)


def tokenizer_identity(out: Plan, row: str) -> str:
    """The identity of the row whose tokenizer a row carries."""
    return out.identities[root(out.recipe, row)]


def model_bytes(out: Plan, row: str) -> int:
    """Bytes that a model of this row's shape takes, as far as is known."""
    source = root(out.recipe, row)
    folder = out.folders.get(source)
    if folder is None or not folder.is_dir():
        told = out.recipe.sources.get(source)
        if told and told.path.startswith("tiny:"):
            return 0
        return round(4 * told.parameters) if told and told.parameters else 1_100_000_000
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))
