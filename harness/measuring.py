"""Open rows as lm-eval models and measure them, keeping what several measurements share."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.errors import RunError
from fusion.vocabulary import load_map
from harness import mirror
from harness.answering import answer, unfinished
from harness.backends import StockLM
from harness.build import forget_failure, note_failure
from harness.ensembles import EnsembleLM
from harness.evaluate import Loaded, load
from harness.locks import owned
from harness.machine import device
from harness.model_folder import model_folder
from harness.plan import Plan, Step, inputs, suite_of
from harness.progress import say
from harness.scores import rescore, score
from harness.scoring import SharedPrefixLM
from harness.steps import tokenizer_identity
from harness.stock_tasks import lay_out
from tasks.datasets import DATASETS


class Measuring:
    """Measures the rows of one plan; suites are loaded once, the last row's model is kept open.

    device: where models go, if not where the recipe says.
    """

    def __init__(self, plan: Plan, device: str | None = None) -> None:
        self.plan = plan
        self.device = device
        self.suites: dict[str, Loaded] = {}
        self.row: str | None = None
        self.lm: Any = None

    def measure(self, row: str, steps: Sequence[Step]) -> dict[str, str]:
        """One row on several suites; reasons by suite for what could not be measured."""
        if self.plan.recipe.machine.shards > 1:
            return self._measure_shards(row, steps)
        reasons = {}
        for step in steps:
            try:
                self.answer(row, step)
                self.score(step)
            except RunError as error:
                reasons[step.name] = str(error)
        return reasons

    def answer(
        self,
        row: str,
        step: Step,
        shard: int = 0,
        shards: int = 1,
        going: Callable[[], bool] = lambda: True,
    ) -> None:
        """Write a shard's missing records; RunError if data or model cannot be had."""
        loaded = self.suite(step)
        mirror.bring(step.folder)
        if self.row != row and unfinished(step, loaded, shard, shards):
            self.release()
            self.lm, self.row = self._open(row), row
        lm = self.lm if self.row == row else None  # nothing is left that would need it
        answer(step, loaded, lm, shard, shards, going)

    def score(self, step: Step) -> None:
        """Derive a measurement's scores, unless another process has; RunError without records."""
        with owned(self.plan.home, step.folder.name):
            mirror.bring(step.folder)
            if not step.done:
                score(self.plan, step, self.suite(step))
                mirror.send(step.folder)

    def rescore(self, step: Step) -> None:
        """Derive scores again from a finished measurement's records."""
        mirror.bring(step.folder)
        rescore(self.plan, step, self.suite(step))
        mirror.send(step.folder)

    def _measure_shards(self, row: str, steps: Sequence[Step]) -> dict[str, str]:
        from harness.shards import measure_shards

        reasons: dict[str, str] = {}
        todo = []
        for step in steps:  # here first, so that no two processes fetch the same data
            try:
                todo.append((step, self.suite(step)))
            except RunError as error:
                reasons[step.name] = str(error)
        try:
            for step, _ in todo:
                mirror.bring(step.folder)
            if any(unfinished(*one) for one in todo):  # weights that are kept as a difference, too
                for model in [row] if self.plan.folders[row] else inputs(self.plan.recipe, row):
                    model_folder(self.plan, model)
        except RunError as error:
            return reasons | {step.name: str(error) for step, _ in todo}
        found = measure_shards(self.plan, row, todo)
        for step, loaded in todo:
            reason = found.get(step.identity)
            if reason is None and "" in found and unfinished(step, loaded):
                reason = found[""]
            if reason is None:
                try:
                    self.score(step)
                except RunError as error:
                    reason = str(error)
            if reason is not None:
                reasons[step.name] = reason
        return reasons

    def release(self) -> None:
        """Forget the open model."""
        self.lm, self.row = None, None
        gc.collect()

    def suite(self, step: Step) -> Loaded:
        """A step's tasks and items; RunError if the data cannot be had."""
        if step.name not in self.suites:
            recipe = self.plan.recipe
            heldout = recipe.corpus.heldout if "heldout" in step.content and recipe.corpus else None
            limit, home = recipe.limit(step.name), self.plan.home
            self.suites[step.name] = load_suite_data(
                step.name, home, limit, recipe.seed, heldout, recipe.evaluate.data
            )
        return self.suites[step.name]

    def _open(self, row: str) -> SharedPrefixLM | StockLM | EnsembleLM:
        variant = self.plan.recipe.variants.get(row)
        if variant is not None and variant.repeat:
            model = self._alone(variant.repeat.row)
            _halve_batches(model)
            return model
        if variant is None or variant.ensemble is None:
            return self._alone(row)
        ensemble = variant.ensemble
        files = [
            step.folder / "map.npz"
            for member in ensemble.members[1:]
            for step in self.plan.steps.values()
            if step.kind == "map"
            and row in step.rows
            and step.content["source"] == tokenizer_identity(self.plan, member)
        ]
        for file in files:
            mirror.bring(file)
        maps = [load_map(file) for file in files]
        opened = {member: self._model(member) for member in dict.fromkeys(ensemble.members)}
        members = [opened[member] for member in ensemble.members]
        parameters, weights = dict(ensemble.parameters), ensemble.weights
        return EnsembleLM(members, ensemble.rule, parameters, maps, weights, ensemble.level)

    def _alone(self, row: str) -> SharedPrefixLM | StockLM:
        """A row that is one model, by the backend that the recipe names."""
        recipe, backend = self.plan.recipe, self.plan.recipe.evaluate.backend
        if backend == "kfuse":
            return self._model(row)
        folder, place = str(model_folder(self.plan, row)), self.device or device(self.plan)
        return StockLM(folder, backend, recipe.evaluate.dtype, place, recipe.seed)

    def _model(self, row: str) -> SharedPrefixLM:
        machine = self.plan.recipe.machine
        return SharedPrefixLM(
            str(model_folder(self.plan, row)),
            self.plan.recipe.evaluate.dtype,
            self.device or device(self.plan),
            machine.batch_tokens,
            machine.generate_rows,
            seed=self.plan.recipe.seed,
        )


def _halve_batches(model: SharedPrefixLM | StockLM) -> None:
    """Let a model be asked in batches of half the size."""
    if isinstance(model, StockLM):  # hf: vLLM forms its own
        model.lm.batch_size_per_gpu = max(1, model.lm.batch_size_per_gpu // 2)
    else:
        model.batch_tokens = max(1, model.batch_tokens // 2)
        model.generate_rows = max(1, model.generate_rows // 2)


def load_suite_data(
    name: str,
    home: Path,
    limit: int | None,
    seed: int,
    heldout: str | None,
    local: str | None,
) -> Loaded:
    """A suite's tasks and items, its data fetched if need be.

    heldout: a text of the recipe's. local: a folder where questions are looked for first.
    """
    data, given = home, None
    known = suite_of(name)
    if heldout:
        from harness.heldout import heldout_suite

        given, data = heldout_suite(heldout, home, name)
    elif known and known.datasets:
        from harness.assets import prepare_data

        data = prepare_data(known.datasets, home, Path(local).expanduser() if local else None)
    # lm-eval explains itself at length; what matters is in our records.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if known and known.stock:
        given, data = known, lay_out(known, data)
    loaded = load(name, data, limit, seed, given)
    if known and not heldout:
        _count_whole(loaded)
    return loaded


def _count_whole(loaded: Loaded) -> None:
    """Say of a folder's part of a set how many questions the whole set has."""
    for task, object_ in loaded.tasks.items():
        dataset = DATASETS.get((object_.config.dataset_kwargs or {}).get("dataset", ""))
        if dataset and dataset.local_rows == loaded.totals[task]:
            loaded.totals[task] = dataset.rows


def measure_rows(plan: Plan, todo: Mapping[str, Sequence[Step]]) -> dict[str, str]:
    """Measure rows one after the other; a reason by "row/suite" for what could not be.

    A reason is also left in the measurement's folder as `failed.json`, until it succeeds.
    """
    measuring = Measuring(plan)
    for row, steps in todo.items():
        missing = unbuilt(plan, row)
        for step in steps:
            forget_failure(step)
        if missing:
            reasons = {step.name: f"not built: {', '.join(missing)}" for step in steps}
        else:
            reasons = measuring.measure(row, steps)
        for step in steps:
            if step.name in reasons:
                reason = reasons[step.name]
                note_failure(step, f"not measured: {reason}")
                say(f"{row} · {step.name}: {reason}")
        measuring.release()
    return failures(todo)


def unbuilt(plan: Plan, row: str) -> list[str]:
    """The models that a row is measured with whose weights are not there."""
    models = [row] if plan.folders[row] else inputs(plan.recipe, row)
    steps = {model: plan.steps.get(plan.identities[model]) for model in models}
    return [model for model, step in steps.items() if step and not step.done]


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
