"""What a recipe's rows came to: rows × suites with scores, intervals, gains and reasons for gaps.

Read from the index that harness writes and the evaluation folders that it names; nothing is
measured here. A gain is paired, positive when the row is better whatever the metric's direction,
and taken only between runs whose signatures differ in nothing but the model. Not measured is never
a number.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.cells import Average, Cell, Column, Gain, Report, TaskScore
from reports.lines import lines
from reports.records import (
    OTHER_METRICS,
    PASS_METRICS,
    Run,
    apart,
    apart_name,
    read_json,
    read_primary,
    read_scores,
    token_perplexities,
    unscored,
)
from reports.seeded import seeded
from reports.signature import differences, signature

if TYPE_CHECKING:
    import pandas as pd

    from reports.statistics import Paired

LEVEL = 0.95


def read(index: Path) -> Report:
    """The report of an index file. ValueError or FileNotFoundError name what does not fit."""
    content = read_json(index)
    home = index.resolve().parent.parent.parent
    opened: dict[tuple[str, str], tuple[Run, pd.DataFrame]] = {}
    cells: dict[tuple[str, str], Cell] = {}
    for row in content["rows"]:
        for suite in content["suites"]:
            found = content["cells"][row["name"]][suite["name"]]
            if "run" not in found:
                for part in _alone(suite):
                    key = (row["name"], part["name"])
                    cells[key] = Cell(*key, reason=found["reason"])
                continue
            for run in apart(Run.open(home / found["run"])):
                key = (row["name"], run.manifest["suite"])
                opened[key] = (run, read_primary(run))
                cell = _cell(*key, *opened[key], found["run"])
                cells[key] = replace(
                    cell,
                    without=_without(cell, suite.get("without", ())),
                    programs=tuple(run.manifest.get("programs", {}).items()),
                    passes=_others(run, PASS_METRICS) if run.manifest.get("programs") else (),
                    others=_others(run, OTHER_METRICS.get(run.manifest["tasks"][0]["metric"], {})),
                )
    content |= {"suites": [part for suite in content["suites"] for part in _alone(suite)]}
    for row in content["rows"]:  # runs of two versions of a suite may have unlike tasks
        for suite in content["suites"]:
            gap = "not measured: this row's run of the suite has no such task"
            key = (row["name"], suite["name"])
            cells.setdefault(key, Cell(*key, reason=gap))
    gains = _gains(content, opened, cells)
    for key, gain in gains.items():
        changed = {"gain": gain} if isinstance(gain, Gain) else {"no_gain": gain}
        cells[key] = replace(cells[key], **changed)  # type: ignore[arg-type]
    return Report(
        recipe=content["recipe"],
        reference=content["reference"],
        rows=tuple(content["rows"]),
        columns=tuple(_column(suite) for suite in content["suites"]),
        cells=cells,
        facts=content["facts"],
        recipe_yaml=content["recipe_yaml"],
        overrides=tuple(content.get("overrides", ())),
        home=home,
        published=tuple(content.get("published", ())),
        lines=lines(content, opened),
        domains=content.get("domains"),
        extra=content.get("extra", {}),
        seeded=seeded(content, opened),
    )


def _alone(suite: dict[str, Any]) -> list[dict[str, Any]]:
    """A suite, or one for each of its tasks if it takes no average."""
    if suite.get("rule") != "apart":
        return [suite]
    return [
        suite
        | {"name": apart_name(suite["name"], task), "tasks": [task], "task_of": suite["name"]}
        | {"title": f"{suite['title']}: {task.get('title', task['task'])}"}
        for task in suite["tasks"]
    ]


def _column(suite: dict[str, Any]) -> Column:
    tasks = suite["tasks"]
    higher = all(task["higher_is_better"] for task in tasks)
    bits = bool(tasks) and all(task["metric"] == "bits_per_byte" for task in tasks)
    unit = "" if bits else "%"
    return Column(suite["name"], suite["title"], higher, unit, suite.get("task_of", ""))


def _generator(*names: str) -> Any:
    """A generator of its own for each number, so that adding a row changes no other interval."""
    import numpy as np

    return np.random.default_rng([zlib.crc32(name.encode()) for name in names])


def _cell(row: str, suite: str, run: Run, frame: pd.DataFrame, where: str) -> Cell:
    from reports.statistics import macro, macro_interval

    # A small sample may leave tasks out altogether; the suite's score is then that of the others.
    by_task = dict(iter(frame.groupby("task", sort=False)))
    drawn = set(by_task) if run.manifest["partial"] else None
    tasks = tuple(
        _task(run, task, by_task.get(task["task"], frame[:0]))
        for task in run.manifest["tasks"]
        if drawn is None or task["task"] in drawn
    )
    if any(task.metric == "bits_per_byte" for task in tasks):
        known = token_perplexities(run)
        tasks = tuple(replace(t, token_perplexity=known.get(t.task)) for t in tasks)
    scored = [t for t in tasks if t.score is not None]
    n = sum(task.n for task in tasks)
    n_total = sum(task["n_total"] for task in run.manifest["tasks"])
    cell = Cell(
        row,
        suite,
        n=n,
        n_total=n_total,
        tasks=tasks,
        health=tuple(sorted(run.manifest.get("health", {}).items())),
        cost=tuple(sorted(run.manifest.get("cost", {}).items())),
        run=where,
        notes=tuple(run.manifest.get("notes") or ()),
    )
    if len(scored) < len(tasks):
        names = ", ".join(t.title for t in tasks if t.score is None)
        reason = f"not measured: no item was scored in {names}"
        if _outcomes(frame, "infra"):
            reason += " (infrastructure: this machine could not judge them)"
        if _outcomes(frame, "unparsed"):
            reason += " (its judge gave no verdict that could be read)"
        if _outcomes(frame, "no_judge"):
            reason = "not measured: no judge; name one as `evaluate.judge`, the answers are kept"
            # That a machine could not judge is not known to have happened zero times.
            health = tuple(one for one in cell.health if one[0] != "infra")
            return replace(cell, reason=reason, health=health)
        return replace(cell, reason=reason)
    scores = [t.score for t in scored if t.score is not None]
    spans = [None if t.low is None or t.high is None else (t.low, t.high) for t in scored]
    low, high = macro_interval(scores, spans) or (None, None)
    sign = signature(run.manifest, n, n_total)
    return replace(cell, score=macro(scores), low=low, high=high, signature=sign)


def _without(cell: Cell, names: Sequence[str]) -> Average | None:
    """The mean over a cell's other tasks; None if none is left out or one has no score."""
    from reports.statistics import macro, macro_interval

    out = [task.title for task in cell.tasks if task.task in names]
    kept = [task for task in cell.tasks if task.task not in names]
    scores = [task.score for task in kept if task.score is not None]
    if not out or not kept or len(scores) < len(kept):
        return None
    spans = [None if t.low is None or t.high is None else (t.low, t.high) for t in kept]
    low, high = macro_interval(scores, spans) or (None, None)
    title = f"without {', '.join(out)}"
    return Average(title, macro(scores), low, high, sum(task.n for task in kept))


def _others(run: Run, titles: Mapping[str, str]) -> tuple[Average, ...]:
    """Other metrics than the primary, averaged as the suite's own score: those that every task has.

    titles: by metric. pass@k is there where every task has a problem with k samples.
    """
    from reports.statistics import macro, macro_interval

    if not titles:
        return ()
    frame = read_scores(run)
    drawn = [task for task in run.manifest["tasks"] if (frame.task == task["task"]).any()]
    out = []
    for metric, title in titles.items():
        some = frame[frame.metric == metric]
        tasks = [_task(run, task, some[some.task == task["task"]], metric) for task in drawn]
        scores = [task.score for task in tasks if task.score is not None]
        if not drawn or len(scores) < len(drawn):
            continue
        spans = [None if t.low is None or t.high is None else (t.low, t.high) for t in tasks]
        low, high = macro_interval(scores, spans) or (None, None)
        out.append(Average(title, macro(scores), low, high, sum(task.n for task in tasks)))
    return tuple(out)


def _outcomes(frame: pd.DataFrame, kind: str) -> int:
    return int((frame.outcome == kind).sum())


def _task(
    run: Run, task: dict[str, Any], frame: pd.DataFrame, metric: str | None = None
) -> TaskScore:
    """A task's score from its rows of one metric, the primary one if none is named."""
    from reports.corpus import CORPUS_METRICS, corpus_interval, corpus_score, stacked
    from reports.statistics import score_interval

    known = frame.value.notna()
    scored = frame if known.all() else frame[known]
    score = interval = None
    generator = _generator(run.manifest["row"], run.manifest["suite"], task["task"])
    metric = metric or task["metric"]
    if len(scored) and metric in CORPUS_METRICS:
        counts = stacked(scored, metric)
        score = corpus_score(counts, metric)
        interval = corpus_interval(counts, metric, generator, LEVEL)
    elif len(scored):
        score = float((scored.value * scored.weight).sum() / scored.weight.sum())
        interval = score_interval(
            scored.value,
            generator,
            weights=scored.weight,
            clusters=scored.cluster,
            level=LEVEL,
        )
    return TaskScore(
        task["task"],
        task.get("title", task["task"]),
        metric,
        score,
        interval[0] if interval else None,
        interval[1] if interval else None,
        len(scored),
        task["n_total"],
        task.get("chance"),
        signature(run.manifest, len(scored), task["n_total"], task["task"]),
    )


def _gains(
    content: dict[str, Any],
    opened: dict[tuple[str, str], tuple[Run, pd.DataFrame]],
    cells: Mapping[tuple[str, str], Cell],
) -> dict[tuple[str, str], Gain | str]:
    """Every row against the reference, suite by suite, p-values corrected together."""
    from reports.statistics import holm

    margins = {suite["name"]: suite.get("margin") for suite in content["suites"]}
    out: dict[tuple[str, str], Gain | str] = {}
    for (row, suite), (run, frame) in opened.items():
        if row == content["reference"] or cells[row, suite].reason:
            continue
        base = opened.get((content["reference"], suite))
        if base is None:
            out[row, suite] = "the reference is not measured"
            continue
        if gap := cells[content["reference"], suite].reason:
            out[row, suite] = f"the reference is {gap}"
            continue
        wrong = differences(run.manifest, base[0].manifest)
        if wrong:
            out[row, suite] = "not comparable: " + "; ".join(wrong)
            continue
        out[row, suite] = _compare(run, frame, base[1], margins.get(suite))
    compared = [key for key, gain in out.items() if isinstance(gain, Gain)]
    found = [out[key] for key in compared]
    adjusted = holm([gain.p_value for gain in found if isinstance(gain, Gain)])
    for key, gain, p in zip(compared, found, adjusted, strict=True):
        if isinstance(gain, Gain):
            out[key] = replace(gain, adjusted=float(p))
    return out


def _compare(
    run: Run, frame: pd.DataFrame, base: pd.DataFrame, margin: float | None = None
) -> Gain | str:
    from reports.statistics import minimum_detectable_effect

    keys = ["task", "doc_id"]
    both = frame.merge(base, on=keys, suffixes=("", "_base"), validate="one_to_one")
    alone = len(frame) + len(base) - 2 * len(both)
    if alone:
        return f"not comparable: {alone} items were measured on one side only"
    both = both[both.value.notna() & both.value_base.notna()]
    gone = unscored(run, frame, both)
    if gone:
        return f"not comparable: no item was scored on both sides in {', '.join(gone)}"
    higher = {task["task"]: task["higher_is_better"] for task in run.manifest["tasks"]}
    sign = both.task.map(higher).map({True: 1.0, False: -1.0})
    both["difference"] = (both.value - both.value_base) * sign
    manifest = run.manifest
    paired = paired_gain(manifest, both, _generator(manifest["row"], manifest["suite"], "gain"))
    differ = paired.better + paired.worse > 0
    return Gain(
        paired.gain,
        paired.low,
        paired.high,
        paired.p_value,
        1.0,
        # null_error is that of the mean itself, so n is one.
        minimum_detectable_effect(null_error(paired, both) ** 2, 1) if differ else 0.0,
        paired.better,
        paired.worse,
        paired.n,
        margin,
    )


def null_error(paired: Paired, both: pd.DataFrame) -> float:
    """The standard error of a gain if both rows were equally good; where the items leave none, as
    if one item of the first task differed by all that values span.
    """
    ends = both[["value", "value_base"]].to_numpy()
    span = float(ends.max() - ends.min()) or 1.0
    return paired.null_variance**0.5 or span / int((both.task == both.task.iloc[0]).sum())


def paired_gain(
    manifest: dict[str, Any], both: pd.DataFrame, generator: Any, level: float = LEVEL
) -> Paired:
    """A row's gain over another from their joined items; `difference` is positive if better.

    ValueError if a metric of a corpus stands among several tasks: those have no common mean.
    """
    from reports.corpus import CORPUS_METRICS, paired_corpus, stacked
    from reports.statistics import paired_bootstrap

    drawn = set(both.task.unique())
    metrics = {task["metric"] for task in manifest["tasks"] if task["task"] in drawn}
    if metrics & set(CORPUS_METRICS):
        if len(drawn) > 1:
            raise ValueError(f"{manifest['suite']}: {', '.join(sorted(metrics))} have no mean")
        (metric,) = metrics
        other = both[["task", "doc_id"]].assign(counts=both.get("counts_base"))
        sides = stacked(both, metric), stacked(other, metric)
        return paired_corpus(*sides, metric, generator, both.difference, level)
    return paired_bootstrap(
        both.difference,
        both.difference * 0.0,
        generator,
        tasks=both.task,
        weights=both.weight,
        clusters=both.cluster,
        level=level,
    )
