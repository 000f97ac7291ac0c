"""What ranks are worth: their intervals over drawn items, and which rows no test tells apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reports.corpus import CORPUS_METRICS, corpus_score, draws, stacked

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
RANK_DRAWS = 1000
FEW = 25  # clusters that differ; up to here the permutation test is not replaced by its normal law


@dataclass(frozen=True)
class Task:
    """One task of all rows, summed by cluster."""

    sums: Array  # (rows, clusters) Σ w·v
    mass: Array  # (clusters,) Σ w


def ranks(
    frames: list[pd.DataFrame], metrics: Mapping[str, str], sign: int, order: list[int]
) -> tuple[list[tuple[int | None, int | None]], list[str]]:
    """Each row's 95 % interval of ranks, and letters of rows that are not told apart.

    frames: the rows' primary values of the same items; metrics: by task; sign: 1 where higher is
    better, else −1; order: the rows, best first. Of equal draws each row has the better rank in its
    lower limit and the worse one in its upper limit. No intervals and no letters where the rows
    have no common mean: a task of which no item was scored for all of them, or a metric of a corpus
    among several tasks.
    """
    rows = len(frames)
    if rows < 2:
        return [(None, None)] * rows, ["a"] * rows
    names = set(frames[0].task)
    corpora = {metrics[name] for name in names} & set(CORPUS_METRICS)
    if _common(frames) != names or (corpora and len(names) > 1):
        return [(None, None)] * rows, [""] * rows
    if corpora:
        drawn, p_values = _corpus(frames, corpora.pop(), sign)
    else:
        tasks = _tasks(frames, sign)
        drawn, p_values = _draws(tasks), pairwise(tasks)
    best = np.stack([1 + (drawn > drawn[i] + 1e-12).sum(axis=0) for i in range(rows)])
    worst = np.stack([(drawn >= drawn[i] - 1e-12).sum(axis=0) for i in range(rows)])
    low = np.quantile(best, 0.025, axis=1, method="lower")
    high = np.quantile(worst, 0.975, axis=1, method="higher")
    spans: list[tuple[int | None, int | None]] = [
        (int(a), int(b)) for a, b in zip(low, high, strict=True)
    ]
    return spans, letters(p_values, order)


def _common(frames: list[pd.DataFrame]) -> set[str]:
    """The tasks that have an item which every row has a score for."""
    keyed = [f.set_index(["task", "doc_id"]).sort_index() for f in frames]
    used = ~np.any([f.value.isna().to_numpy() for f in keyed], axis=0)
    return set(keyed[0].index.get_level_values(0)[used])


def _tasks(frames: list[pd.DataFrame], sign: int) -> list[Task]:
    """Items by task and cluster; an item that a row has no score for is left out for all rows."""
    keyed = [f.set_index(["task", "doc_id"]).sort_index() for f in frames]
    values = sign * np.stack([f.value.to_numpy(dtype=float) for f in keyed])
    used = ~np.isnan(values).any(axis=0)
    names = keyed[0].index.get_level_values(0).to_numpy()[used]
    cluster, weight = keyed[0].cluster.to_numpy()[used], keyed[0].weight.to_numpy()[used]
    values = values[:, used]
    out = []
    for name in np.unique(names):
        inside = names == name
        _, code = np.unique(cluster[inside], return_inverse=True)
        w = weight[inside]
        sums = np.stack([np.bincount(code, weights=v * w) for v in values[:, inside]])
        mass = np.bincount(code, weights=w)
        out.append(Task(sums.astype(np.float64), mass.astype(np.float64)))
    return out


def _corpus(frames: list[pd.DataFrame], metric: str, sign: int) -> tuple[Array, Array]:
    """Drawn scores (rows, draws) of a metric of a whole corpus, and p-values of pairs of rows.

    The p-values are the normal law's, with the spread of the pair's drawn differences.
    """
    from scipy.stats import norm

    keyed = [f.set_index(["task", "doc_id"]).sort_index() for f in frames]
    used = ~np.any([f.value.isna().to_numpy() for f in keyed], axis=0)
    counts = np.stack([stacked(f.reset_index()[used], metric) for f in keyed])
    drawn = sign * draws(counts, metric, np.random.default_rng(17), RANK_DRAWS)
    scores = np.array([corpus_score(part, metric) for part in counts])
    gaps = np.abs(scores[:, None] - scores[None])
    errors = np.stack([np.std(row - drawn, axis=1) for row in drawn])
    return drawn, np.where(errors > 1e-12, 2 * norm.sf(gaps / np.maximum(errors, 1e-12)), 1.0)


def _draws(tasks: list[Task]) -> Array:
    """(rows, draws) macro scores, each draw over the same clusters for all rows."""
    generator = np.random.default_rng(17)
    drawn = np.zeros((len(tasks[0].sums), RANK_DRAWS))
    for task in tasks:
        size = len(task.mass)
        counts = generator.multinomial(size, np.full(size, 1 / size), RANK_DRAWS).astype(float)
        drawn += (task.sums @ counts.T) / (counts @ task.mass) / len(tasks)
    return drawn


def pairwise(tasks: list[Task]) -> Array:
    """(rows, rows) two-sided p-values of paired differences, symmetric, 1 on the diagonal.

    The permutation test that swaps two rows within clusters, of which each has the share x of the
    macro difference: exact or sampled up to 25 clusters that differ, beyond by its normal law,
    z = Σx / √Σx². Rows that differ nowhere have p = 1.
    """
    from scipy.stats import norm

    from reports.statistics import DRAWS, sign_flip

    shares = np.concatenate([t.sums / (t.mass.sum() * len(tasks)) for t in tasks], axis=1)
    generator = np.random.default_rng(18)
    rows = len(shares)
    out = np.ones((rows, rows))
    known: dict[tuple[float, ...], float] = {}
    for one in range(rows - 1):
        difference = shares[one + 1 :] - shares[one]
        spread = np.sqrt(np.sum(difference**2, axis=1))
        z = np.abs(difference.sum(axis=1)) / np.maximum(spread, 1e-300)
        p = 2 * norm.sf(z)
        for place in np.flatnonzero((difference != 0).sum(axis=1) <= FEW):
            parts = difference[place]
            key = (abs(float(parts.sum())), *np.sort(np.abs(parts[parts != 0])).tolist())
            if key not in known:  # right/wrong items have few patterns, many rows the same ones
                known[key] = sign_flip(parts, generator, DRAWS)
            p[place] = known[key]
        out[one, one + 1 :] = out[one + 1 :, one] = p
    return out


def letters(p_values: Array, order: list[int]) -> list[str]:
    """Compact letters: rows share one if no pair among them is told apart (Holm over all pairs)."""
    from reports.statistics import holm

    rows = len(p_values)
    one, two = np.triu_indices(rows, 1)
    apart = np.zeros((rows, rows), bool)
    apart[one, two] = holm(p_values[one, two]) < 0.05
    apart |= apart.T
    groups: list[list[int]] = []
    for start in range(rows):
        group = [order[start]]
        for other in order[start + 1 :]:
            if apart[other, group].any():
                break
            group.append(other)
        if not groups or not set(group) <= set(groups[-1]):
            groups.append(group)
    out = [""] * rows
    for number, group in enumerate(groups):
        for member in group:
            out[member] += _letter(number)
    return out


def _letter(number: int) -> str:
    name = chr(ord("a") + number % 26)
    return name if number < 26 else f"{name}{number // 26}"
