"""The steps of a plan, each one folder, and the plan that holds them in an order that works."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.mergekit import reshapes
from harness.recipe import Recipe
from harness.store import read_manifest


@dataclass(frozen=True)
class Step:
    """One folder to be made: what kind, for which rows, from what, and about how large."""

    kind: str  # fetch, pack, capture, map, train, merge, evaluate
    name: str
    folder: Path
    identity: str
    content: dict[str, Any]
    needs: tuple[str, ...] = ()  # identities of steps
    rows: tuple[str, ...] = ()
    tokens: int = 0
    disk: int = 0

    @property
    def done(self) -> bool:
        """Whether the folder is finished."""
        return read_manifest(self.folder) is not None

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
