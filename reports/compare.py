"""Two rows item by item: gains of tasks and suites, and the items on which the rows differ.

Only runs whose signatures differ in nothing but the model are compared, and only if both measured
the same items with the same prompts; all else raises `NotComparable`, which says what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from reports.gates import verdict
from reports.records import Run, read_primary, read_samples
from reports.signature import differences

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
LEVEL = 0.95
FEW = 25  # discordant items; below, the bootstrap is too sure of itself
KEY = ["task", "doc_id"]


class NotComparable(ValueError):
    """Two runs that must not or cannot be compared; says why."""


class Unscored(NotComparable):
    """A suite that two rows have no gain in, for want of scores."""

    def __init__(self, said: str, some: bool) -> None:
        super().__init__(said)
        self.some = some  # a row does have scores there


def opened(read: Callable[[Any], T], what: Any) -> T:
    """What `read` gives; a file that is not what it should be is NotComparable, too."""
    try:
        return read(what)
    except ValueError as error:
        raise NotComparable(str(error)) from error


@dataclass(frozen=True)
class Difference:
    """The candidate against the base; positive is better. Fractions or bits per byte."""

    name: str  # of a task, or of the suite
    base: float
    candidate: float
    gain: float
    low: float | None
    high: float | None
    interval: Literal["tango", "mover", "bootstrap", "none"]
    p_value: float
    test: Literal["mcnemar", "permutation"]
    detectable: float | None  # with 80 % power; None where no item differs: these cannot tell
    better: int  # items where the candidate has the better value
    worse: int
    n: int
    error: float  # standard error of the gain if both were equally good; one item differs at least
    adjusted: float = 1.0  # Holm: over the tasks of the suite, and over the suites
    margin: float | None = None  # what does not matter, if the caller says so

    @property
    def verdict(self) -> str:
        """better, worse or inconclusive at 5 % after Holm's correction; equivalent if the whole
        interval is within the margin.
        """
        return verdict(self.gain, self.adjusted, self.low, self.high, self.margin)


@dataclass(frozen=True)
class Comparison:
    """One suite of two rows: the suite's difference, its tasks' and the items that differ."""

    suite: str
    base: str
    candidate: str
    unit: str  # "%" for fractions, "" for bits per byte
    total: Difference
    tasks: tuple[Difference, ...]
    n_total: int
    unscored: int  # items without a score on either side
    items: pd.DataFrame | None = None  # see `differing`


def scored(pairs: Sequence[tuple[Run, Run]]) -> tuple[list[tuple[Run, Run]], list[Unscored]]:
    """The pairs whose suite has a gain, and why the others have none. NotComparable if all have."""
    kept, gaps = [], []
    for base, candidate in pairs:
        try:
            _joined(base, candidate)
        except Unscored as error:
            gaps.append(error)
        else:
            kept.append((base, candidate))
    if gaps and not kept:
        raise NotComparable("; ".join(map(str, gaps)))
    return kept, gaps


def compare(base: Run, candidate: Run, level: float = LEVEL, items: bool = True) -> Comparison:
    """One suite of two runs. NotComparable or FileNotFoundError say why not.

    items: also read the raw records and list where the rows differ.
    """
    both, recorded = _joined(base, candidate)
    measured = candidate.manifest["tasks"]
    groups = dict(list(both.groupby("task", sort=False)))
    drawn = [t["task"] for t in measured if t["task"] in groups]
    titles = {t["task"]: t.get("title", t["task"]) for t in measured}
    tasks = adjusted([_difference(titles[name], groups[name], candidate, level) for name in drawn])
    total = tasks[0]
    if len(tasks) > 1:
        _have_a_mean(candidate, drawn)
        total = _difference(candidate.manifest["suite"], both, candidate, level, tasks)
    return Comparison(
        suite=candidate.manifest["suite"],
        base=base.manifest["row"],
        candidate=candidate.manifest["row"],
        unit="" if all(t["metric"] == "bits_per_byte" for t in measured) else "%",
        total=total,
        tasks=tasks,
        n_total=sum(t["n_total"] for t in measured),
        unscored=sum(recorded.values()) - len(both),
        items=differing(base, candidate, both) if items else None,
    )


def _have_a_mean(run: Run, drawn: Sequence[str]) -> None:
    from reports.corpus import CORPUS_METRICS

    metrics = {task["metric"] for task in run.manifest["tasks"] if task["task"] in drawn}
    if metrics & set(CORPUS_METRICS):
        raise NotComparable(
            f"{run.manifest['suite']}: {', '.join(sorted(metrics))} have no mean over items, "
            "so the suite has no gain; a suite with the rule 'apart' compares each task by itself"
        )


def adjusted(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    """The same with Holm's correction over them as one family."""
    from reports.statistics import holm

    corrected = holm([d.p_value for d in differences])
    return tuple(replace(d, adjusted=float(p)) for d, p in zip(differences, corrected, strict=True))


def compare_all(
    pairs: Sequence[tuple[Run, Run]], level: float = LEVEL, margin: float | None = None
) -> list[Comparison]:
    """Every suite of two rows, the suites' p-values corrected together.

    margin: a gain whose whole interval is within ±margin is equivalent.
    """
    found = [compare(base, candidate, level) for base, candidate in pairs]
    totals = adjusted([comparison.total for comparison in found])
    return [
        replace(
            one,
            total=replace(total, margin=margin),
            tasks=tuple(replace(task, margin=margin) for task in one.tasks),
        )
        for one, total in zip(found, totals, strict=True)
    ]


def _label(base: Run, candidate: Run) -> str:
    return (
        f"{candidate.manifest['suite']}: {candidate.manifest['row']} cannot be compared with "
        f"{base.manifest['row']}"
    )


def primary(run: Run) -> pd.DataFrame:
    """`read_primary`; NotComparable also where it lacks what a corpus' score is made of."""
    from reports.corpus import CORPUS_METRICS, stacked

    frame = opened(read_primary, run)
    for task in run.manifest["tasks"]:
        if task["metric"] in CORPUS_METRICS:
            scored = frame[(frame.task == task["task"]) & frame.value.notna()]
            opened(partial(stacked, metric=task["metric"]), scored)
    return frame


def _joined(base: Run, candidate: Run) -> tuple[pd.DataFrame, dict[str, int]]:
    """Items scored on both sides, with `difference` positive where the candidate is better; and how
    many items, scored or not, each task has on both sides. Unscored if a task has none.
    """
    wrong = differences(candidate.manifest, base.manifest)
    if wrong:
        raise NotComparable(f"{_label(base, candidate)}: " + "; ".join(wrong))
    one, two = primary(candidate), primary(base)
    both = one.merge(two, on=KEY, suffixes=("", "_base"), validate="one_to_one", how="inner")
    alone = len(one) + len(two) - 2 * len(both)
    if alone:
        raise NotComparable(
            f"{_label(base, candidate)}: {alone} items were measured on one side only; "
            "evaluate both rows again on the same questions"
        )
    scored = both.value.notna() & both.value_base.notna()
    recorded = {str(task): len(some) for task, some in both.groupby("task", sort=False)}
    # A small sample may leave a task out altogether; one that was asked must have been scored.
    listed = [task["task"] for task in candidate.manifest["tasks"]]
    asked = list(recorded) if candidate.manifest["partial"] else listed
    missing = [task for task in asked if not scored[both.task == task].any()]
    if missing or not scored.any():
        some = bool(both.value.notna().any() or both.value_base.notna().any())
        which = f" of {', '.join(missing)}" if scored.any() else ""
        raise Unscored(
            f"{_label(base, candidate)}: no item{which} was scored on both sides, "
            "so the suite has no gain",
            some,
        )
    both = both[scored].reset_index(drop=True)
    unlike = both.weight != both.weight_base
    if unlike.any():
        first = both[unlike].iloc[0]
        raise NotComparable(
            f"{_label(base, candidate)}: item {first.doc_id} of {first.task} weighs {first.weight} "
            f"and {first.weight_base}; the rows did not measure the same text"
        )
    higher = {task["task"]: task["higher_is_better"] for task in candidate.manifest["tasks"]}
    sign = both.task.map(higher).map({True: 1.0, False: -1.0})
    both["difference"] = (both.value - both.value_base) * sign
    return both, recorded


def _difference(
    name: str,
    both: pd.DataFrame,
    candidate: Run,
    level: float,
    parts: tuple[Difference, ...] = (),
) -> Difference:
    import numpy as np

    from reports.corpus import CORPUS_METRICS, corpus_score, stacked
    from reports.statistics import macro, mcnemar, minimum_detectable_effect
    from reports.table import _generator, null_error, paired_gain

    manifest = candidate.manifest
    generator = _generator(manifest["row"], manifest["suite"], name, "gain")
    paired = paired_gain(manifest, both, generator, level)
    metric = next(t["metric"] for t in manifest["tasks"] if t["task"] == both.task.iloc[0])
    whole = both.value.isin([0.0, 1.0]).all() and both.value_base.isin([0.0, 1.0]).all()
    alone = not both.duplicated(["task", "cluster"]).any() and both.weight.nunique() == 1
    binary = bool(whole and alone and metric not in CORPUS_METRICS)
    low, high, kind = _interval(paired, parts, binary, level)
    p_value, test = paired.p_value, "permutation"
    if binary and not parts:
        p_value, test = mcnemar(paired.better, paired.worse).p_value, "mcnemar"
    if parts:
        base, score = macro([p.base for p in parts]), macro([p.candidate for p in parts])
        error = float(np.sqrt(sum(p.error**2 for p in parts))) / len(parts)
    else:
        if metric in CORPUS_METRICS:
            score = corpus_score(stacked(both, metric), metric)
            base = score - paired.gain
        else:
            base = float(np.average(both.value_base, weights=both.weight))
            score = float(np.average(both.value, weights=both.weight))
        error = null_error(paired, both)
    shown = minimum_detectable_effect(error**2, 1) if paired.better + paired.worse else None
    return Difference(
        name, base, score, paired.gain, low, high, kind, p_value, test,  # type: ignore[arg-type]
        shown, paired.better, paired.worse, paired.n, error,
    )  # fmt: skip


def _interval(
    paired: Any, parts: tuple[Difference, ...], binary: bool, level: float
) -> tuple[float | None, float | None, str]:
    """Tango's for right/wrong items, joined over tasks where few differ; else the bootstrap's."""
    from reports.discordance import tango
    from reports.statistics import macro_interval

    if binary and not parts:
        low, high = tango(paired.better, paired.worse, paired.n, level)
        return low, high, "tango"
    few = paired.better + paired.worse < FEW and all(p.interval == "tango" for p in parts)
    if parts and (paired.low is None or few):
        spans = [None if p.low is None or p.high is None else (p.low, p.high) for p in parts]
        joined = macro_interval([p.gain for p in parts], spans)
        if joined:
            return joined[0], joined[1], "mover"
    return paired.low, paired.high, "bootstrap" if paired.low is not None else "none"


def differing(base: Run, candidate: Run, both: pd.DataFrame) -> pd.DataFrame:
    """The items whose values differ: prompt hash, and of both rows value, outcome and answer.

    Columns task, doc_id, prompt_hash, gold, and value, outcome, answer of each side (`_base` and
    `_candidate`). NotComparable if an item's prompt or document is not the same on both sides.
    """
    columns = [*KEY, "prompt_hash", "doc_hash", "gold", "answer"]
    sides = []
    for run in (base, candidate):
        frame = opened(read_samples, run)
        lacking = [name for name in ("prompt_hash", "doc_hash") if name not in frame]
        if lacking:
            raise NotComparable(f"{run.folder}/samples-*.parquet: no column {', '.join(lacking)}")
        sides.append(frame)
    asked = sides[0].merge(sides[1], on=KEY, suffixes=("_base", "_candidate"), how="outer")
    wrong = (asked.prompt_hash_base != asked.prompt_hash_candidate) | (
        asked.doc_hash_base != asked.doc_hash_candidate
    )
    if wrong.any():
        first = asked[wrong].iloc[0]
        raise NotComparable(
            f"{_label(base, candidate)}: {int(wrong.sum())} items were not asked in the same "
            f"words, the first is {first.doc_id} of {first.task}"
        )
    unlike = both[both.difference != 0]
    out = unlike.rename(columns={"value": "value_candidate", "outcome": "outcome_candidate"})
    out = out[[*KEY, "value_base", "outcome_base", "value_candidate", "outcome_candidate"]]
    metrics = {task["task"]: task["metric"] for task in candidate.manifest["tasks"]}
    for frame, side in zip(sides, ("base", "candidate"), strict=True):
        chosen = frame.merge(unlike[KEY], on=KEY)
        chosen["answer"] = [
            answer({str(k): v for k, v in r.items()}, metrics[r["task"]])
            for r in chosen.to_dict("records")
        ]
        kept = [c for c in columns if c in chosen] if side == "base" else [*KEY, "answer"]
        out = out.merge(chosen[kept].rename(columns={"answer": f"answer_{side}"}), on=KEY)
    return out.drop(columns="doc_hash").reset_index(drop=True)


def answer(record: dict[str, Any], metric: str) -> str:
    """What a row said to one item: its text, or the choice that it found likeliest and how likely.

    `acc_norm` divides by characters, as lm-eval does; nats else.
    """
    import numpy as np

    texts = record.get("generation")
    if texts is not None and len(texts):
        ends = record.get("finish_reason")
        cut = ends is not None and len(ends) and ends[0] == "length"
        return f"{texts[0]}{' [cut off]' if cut else ''}"
    likely = np.asarray(record.get("choice_ll"), dtype=float)
    if record.get("output_type") == "loglikelihood_rolling":
        return f"{likely.sum():.3f} nats"
    if metric == "acc_norm":
        likely = likely / np.maximum(1, np.asarray(record["choice_chars"], dtype=float))
    best = int(np.argmax(likely))
    return f"choice {best} ({', '.join(f'{x:.3f}' for x in likely)})"
