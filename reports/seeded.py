"""Variants that a report has with several training seeds: one gain, and what the seeds did to it.

Rows whose trainings differ in nothing but the seed carry the same `trained` key in the index. A
row's own gain says how well these weights do; here the question is how well the variant does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from reports.gates import verdict
from reports.records import Run, unscored
from reports.signature import differences

if TYPE_CHECKING:
    import pandas as pd

Opened = Mapping[tuple[str, str], tuple[Run, "pd.DataFrame"]]


@dataclass(frozen=True)
class Seeded:
    """A variant over its training seeds against the reference, on one suite; positive is better."""

    rows: tuple[str, ...]  # one a seed
    reference: tuple[str, ...]
    suite: str
    gain: float
    low: float
    high: float
    p_value: float
    adjusted: float  # Holm over all such lines of the report
    seed_error: float  # standard error of the gain from training seeds
    item_error: float  # and from the draw of items
    n: int

    @property
    def verdict(self) -> str:
        """better, worse or inconclusive, at 5 % after Holm's correction."""
        return verdict(self.gain, self.adjusted, self.low, self.high, None)


def seeded(content: Mapping[str, Any], opened: Opened) -> tuple[Seeded, ...]:
    """Every variant with two seeds or more, suite by suite, in the report's order.

    content: the report's index. Suites that a seed lacks, with tasks of one item, or with a score
    of a whole corpus, which has no mean over items, and gains that do not vary at all are left out.
    """
    from reports.statistics import holm

    families: dict[str, list[str]] = {}
    for row in content["rows"]:
        if row.get("trained"):
            families.setdefault(row["trained"], []).append(row["name"])
    base = [content["reference"]]
    base = next((names for names in families.values() if base[0] in names), base)
    found = [
        line
        for names in families.values()
        for suite in content["suites"]
        if len(names) > 1 and names != base
        if (line := _line(names, base, suite["name"], opened)) is not None
    ]
    corrected = holm([line.p_value for line in found])
    return tuple(replace(x, adjusted=float(p)) for x, p in zip(found, corrected, strict=True))


def _line(names: list[str], base: list[str], suite: str, opened: Opened) -> Seeded | None:
    from reports.corpus import CORPUS_METRICS
    from reports.seeds import seeds_and_items

    rows = [*names, *base]
    if not all((name, suite) in opened for name in rows):
        return None
    first = opened[base[0], suite][0].manifest
    if any(differences(opened[name, suite][0].manifest, first) for name in names):
        return None
    if any(task["metric"] in CORPUS_METRICS for task in first["tasks"]):
        return None
    frames = [opened[name, suite][1].set_index(["task", "doc_id"]) for name in rows]
    scored = [set(frame.index[frame.value.notna()]) for frame in frames]
    if not scored[0] or any(items != scored[0] for items in scored):
        return None
    run, frame = opened[base[0], suite]
    if unscored(run, frame, frame[frame.value.notna()]):
        return None
    units = _units([frame.loc[sorted(scored[0])] for frame in frames])
    signs = {task["task"]: 1 if task["higher_is_better"] else -1 for task in first["tasks"]}
    values = units.to_numpy().T * units.index.get_level_values("task").map(signs).to_numpy()
    tasks = units.index.get_level_values("task")
    try:
        found = seeds_and_items(values[: len(names)], values[len(names) :], tasks)
    except ValueError:  # a task of one item, or nothing varies: the variance is unknown
        return None
    return Seeded(
        tuple(names), tuple(base), suite, found.gain, found.low, found.high, found.p_value, 1.0,
        float(np.sqrt(found.seed_variance)), float(np.sqrt(found.item_variance)), len(scored[0]),
    )  # fmt: skip


def _units(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """(clusters, rows): what each cluster adds, so that the plain mean is Σ w·v / Σ w of a task."""
    import pandas as pd

    first = frames[0]
    keys = [first.index.get_level_values("task"), first.cluster.rename("cluster")]
    mass = first.weight.groupby(keys).sum()
    share = mass.groupby("task").transform("mean")
    sums = [(frame.value * first.weight).groupby(keys).sum() / share for frame in frames]
    return pd.concat(sums, axis=1)
