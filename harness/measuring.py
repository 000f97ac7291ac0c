"""Open rows as lm-eval models and measure them, keeping what several measurements share."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.errors import RunError
from fusion.vocabulary import load_map
from harness.build import device, model_folder
from harness.ensembles import EnsembleLM
from harness.evaluate import Loaded, load, measure
from harness.plan import Plan, Step, inputs, suite_of, tokenizer_identity
from harness.progress import say
from harness.scoring import SharedPrefixLM
from harness.store import write_json


class Measuring:
    """Measures the rows of one plan; suites are loaded once, the last row's model is kept open."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.suites: dict[str, Loaded] = {}
        self.row: str | None = None
        self.lm: Any = None

    def built(self, row: str) -> bool:
        """Whether a row's weights are there."""
        step = self.plan.steps.get(self.plan.identities[row])
        return step is None or step.done

    def measure(self, row: str, step: Step) -> None:
        """One row on one suite; RunError if data or model cannot be had."""
        loaded = self._suite(step)
        if self.row != row:
            self.release()
            self.lm, self.row = self._open(row), row
        measure(self.plan, step, loaded, self.lm)

    def release(self) -> None:
        """Forget the open model."""
        self.lm, self.row = None, None
        gc.collect()

    def _suite(self, step: Step) -> Loaded:
        if step.name not in self.suites:
            known = suite_of(step.name)
            data, given = self.plan.home, None
            recipe = self.plan.recipe
            if "heldout" in step.content and recipe.corpus and recipe.corpus.heldout:
                from harness.heldout import heldout_suite

                given, data = heldout_suite(recipe.corpus.heldout, self.plan.home)
            elif known and known.datasets:
                from harness.assets import prepare_data

                local = recipe.evaluate.data
                place = Path(local).expanduser() if local else None
                data = prepare_data(known.datasets, self.plan.home, place)
            # lm-eval explains itself at length; what matters is in our records.
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            limit = recipe.limit(step.name)
            self.suites[step.name] = load(step.name, data, limit, recipe.seed, given)
        return self.suites[step.name]

    def _open(self, row: str) -> SharedPrefixLM | EnsembleLM:
        variant = self.plan.recipe.variants.get(row)
        if variant is None or variant.ensemble is None:
            return self._model(row)
        ensemble = variant.ensemble
        maps = [
            load_map(step.folder / "map.npz")
            for member in ensemble.members[1:]
            for step in self.plan.steps.values()
            if step.kind == "map"
            and row in step.rows
            and step.content["source"] == tokenizer_identity(self.plan, member)
        ]
        members = [self._model(member) for member in ensemble.members]
        return EnsembleLM(members, ensemble.rule, dict(ensemble.parameters), maps)

    def _model(self, row: str) -> SharedPrefixLM:
        machine = self.plan.recipe.machine
        return SharedPrefixLM(
            str(model_folder(self.plan, row)),
            self.plan.recipe.evaluate.dtype,
            device(self.plan),
            machine.batch_tokens,
            machine.generate_rows,
        )


def measure_rows(plan: Plan, todo: Mapping[str, Sequence[Step]]) -> dict[str, str]:
    """Measure rows one after the other; a reason by "row/suite" for what could not be.

    A reason is also left in the measurement's folder as `failed.json`, until it succeeds.
    """
    measuring = Measuring(plan)
    for row, steps in todo.items():
        models = [row] if plan.folders[row] else inputs(plan.recipe, row)
        missing = [model for model in models if not measuring.built(model)]
        for step in steps:
            note = step.folder / "failed.json"
            note.unlink(missing_ok=True)
            try:
                if missing:
                    raise RunError(f"not built: {', '.join(missing)}")
                measuring.measure(row, step)
            except RunError as error:
                step.folder.mkdir(parents=True, exist_ok=True)
                write_json(note, {"reason": f"not measured: {error}"})
                say(f"{row} · {step.name}: {error}")
        measuring.release()
    return failures(todo)


def failures(todo: Mapping[str, Sequence[Step]]) -> dict[str, str]:
    """Why steps failed, by "row/suite", as their folders say."""
    found = {}
    for row, steps in todo.items():
        for step in steps:
            if not step.done:
                found[f"{row}/{step.name}"] = (
                    step.failure or "not measured: the process ended early"
                )
    return found
