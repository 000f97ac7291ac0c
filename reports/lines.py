"""Reference lines: what rows come to beside the models that they draw on, item by item.

The *sources* here are the rows that fusions and ensembles of the report draw on; where none does,
its source rows. The *target* of a row is the given LLM that its weights began as. Everything is
computed from records; a line whose items are not all there has a reason in place of a number.
"Right" and "wrong" have a meaning where every value is 0 or 1. Chance is in all of them: a guesser
is right now and then where no source was, and several guessers are right more often than one.

S sources, n items of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reports.records import unscored
from reports.signature import differences

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from reports.records import Run

Opened = Mapping[tuple[str, str], tuple["Run", "pd.DataFrame"]]
KEYS = ["task", "doc_id"]
BEST, TASK_ORACLE, ITEM_ORACLE = "best single source", "task oracle", "item oracle"
GAP, FORGOTTEN, EMERGENT, WON = "gap recovered", "forgotten", "emergent", "blocks won"


@dataclass(frozen=True)
class Line:
    """One figure: of a suite's sources (row is empty), or of a row; in `reason` why there is none.

    value, low, high: in the suite's unit for best source and oracles, else fractions. n: items (for
    `blocks won` blocks) that it is a share or a mean of. detail: who, or how many.
    """

    suite: str
    row: str
    name: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    detail: str = ""
    reason: str = ""


def sources(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows that fusions and ensembles draw on, in the report's order; else the source rows."""
    drawn = {s for row in rows if row.get("kind") != "merge" for s in row.get("sources", ())}
    named = [row["name"] for row in rows if row["name"] in drawn]
    return named or [row["name"] for row in rows if row.get("kind") == "source"]


def lines(content: Mapping[str, Any], opened: Opened) -> tuple[Line, ...]:
    """All reference lines of a report: its index, and its runs with their primary scores."""
    rows = content["rows"]
    names = sources(rows)
    out = [line for row in rows for line in _won(row)]
    for suite in content["suites"]:
        out += _suite(suite["name"], names, rows, opened)
    return tuple(out)


def _won(row: Mapping[str, Any]) -> list[Line]:
    """Share of the corpus' blocks that each source of a fused row predicted best."""
    from reports.statistics import wilson

    won = row.get("won")
    if not won:
        return []
    n = sum(won.values())
    return [
        Line("", row["name"], WON, count / n, *wilson(count, n), n, f"{source}: {count} of {n}")
        for source, count in won.items()
    ]


def _suite(
    suite: str, names: list[str], rows: Sequence[Mapping[str, Any]], opened: Opened
) -> list[Line]:
    if len(names) < 2:
        return []
    absent = [name for name in names if (name, suite) not in opened]
    if absent:
        what = f"not measured: no records of {', '.join(absent)}"
        return [Line(suite, "", name, reason=what) for name in (BEST, TASK_ORACLE, ITEM_ORACLE)]
    try:
        table = _Table(suite, names, opened)
    except ValueError as error:
        return [Line(suite, "", BEST, reason=str(error))]
    out = table.of_sources()
    for row in rows:
        if row["name"] in names or (row["name"], suite) not in opened:
            continue
        out.append(table.gap(row["name"]))
    if not table.binary:
        return out
    for row in rows:
        if (row["name"], suite) not in opened:
            continue
        target = row.get("target")
        if target and target != row["name"]:
            out.append(table.forgotten(row["name"], target))
        if row["name"] not in names:
            out.append(table.emergent(row["name"]))
    return out


def _of_items(run: Run) -> None:
    """ValueError for a metric whose score is no mean over items, which all lines are made of."""
    from reports.corpus import CORPUS_METRICS

    whole = {task["metric"] for task in run.manifest["tasks"]} & set(CORPUS_METRICS)
    if whole:
        names = ", ".join(sorted(whole))
        raise ValueError(f"no lines: {names} is a score of the whole corpus, and no mean of items")


class _Table:
    """One suite's items with every source's value, and the lines drawn from them.

    ValueError if the sources' runs cannot be compared, share no scored item of a task, or have a
    score of the whole corpus, which is no mean over items.
    """

    def __init__(self, suite: str, names: list[str], opened: Opened) -> None:
        self.suite, self.names, self.opened = suite, names, opened
        import pandas as pd

        run, frame = opened[names[0], suite]
        self.run = run
        _of_items(run)
        self.tasks = [task["task"] for task in run.manifest["tasks"]]
        higher = {task["task"]: task["higher_is_better"] for task in run.manifest["tasks"]}
        items = frame[[*KEYS, "cluster", "weight"]].copy()
        for name in names:
            items = items.merge(self._values(name), on=KEYS, validate="one_to_one")
        self.items = items.dropna(subset=names).reset_index(drop=True)
        gone = unscored(run, frame, self.items)
        if gone:
            what = f"no item was scored for all sources in {', '.join(gone)}"
            raise ValueError(f"not measured: {what}")
        self.code, self.drawn = pd.factorize(self.items.task)
        self.sign = self.items.task.map(higher).map({True: 1.0, False: -1.0})
        self.binary = bool(self.items[names].isin([0.0, 1.0]).all(axis=None))
        scores = {name: self._score(self.items[name] * self.sign) for name in names}
        self.best = max(names, key=lambda name: scores[name])
        signed = self.items[names].mul(self.sign, axis=0)
        self.oracle = signed.max(axis=1) * self.sign

    def _values(self, name: str) -> pd.DataFrame:
        """A row's value of each item, as a column of its name; ValueError if items differ."""
        run, frame = self.opened[name, self.suite]
        wrong = differences(run.manifest, self.run.manifest)
        first = self.opened[self.names[0], self.suite][1]
        if wrong:
            raise ValueError(f"not comparable: {name}: {'; '.join(wrong)}")
        if not frame[KEYS].equals(first[KEYS]):  # in another order it is slower to tell
            here, there = (set(zip(f.task, f.doc_id, strict=True)) for f in (frame, first))
            if here != there:
                lost = len(there - here)
                raise ValueError(f"not measured: {name} lacks {lost} of {len(there)} items")
        return frame[[*KEYS, "value"]].rename(columns={"value": name})

    def _means(self, values: pd.Series) -> dict[str, float]:
        """Σ w·v / Σ w of each task, in the suite's order."""
        import numpy as np

        sums, over = (
            np.bincount(self.code, weights=w)
            for w in (values * self.items.weight, self.items.weight)
        )
        found = dict(zip(self.drawn, (sums / over).tolist(), strict=True))
        return {task: found[task] for task in self.tasks if task in found}

    def _score(self, values: pd.Series) -> float:
        means = self._means(values)
        return sum(means.values()) / len(means)

    def _line(self, name: str, values: pd.Series, detail: str) -> Line:
        """A score over tasks with its interval, as a row's own."""
        from reports.statistics import macro, macro_interval, score_interval
        from reports.table import _generator

        # The best source's interval is to the digit that of its own cell.
        of = (self.best, self.suite) if name == BEST else (self.suite, name)
        scores, spans = [], []
        for task, score in self._means(values).items():
            at = self.code == self.drawn.get_loc(task)
            scores.append(score)
            spans.append(
                score_interval(
                    values[at],
                    _generator(*of, task),
                    weights=self.items.weight[at],
                    clusters=self.items.cluster[at],
                )
            )
        low, high = macro_interval(scores, spans) or (None, None)
        return Line(self.suite, "", name, macro(scores), low, high, len(self.items), detail)

    def of_sources(self) -> list[Line]:
        """The best source, the best for each task, the best for each item.

        The best source and the task's are chosen on the items that they are then measured on, so
        they are high by what chance gave them.
        """
        by_task = {name: self._means(self.items[name] * self.sign) for name in self.names}
        chosen = {
            task: max(self.names, key=lambda name: by_task[name][task])
            for task in by_task[self.best]
        }
        values = self.items[self.best].copy()
        for task, name in chosen.items():
            at = self.code == self.drawn.get_loc(task)
            values[at] = self.items[name][at]
        counts = [(n, list(chosen.values()).count(n)) for n in self.names]
        shares = ", ".join(f"{name} on {count}" for name, count in counts if count)
        return [
            self._line(BEST, self.items[self.best], self.best),
            self._line(TASK_ORACLE, values, f"{shares} of {len(chosen)} tasks"),
            self._line(ITEM_ORACLE, self.oracle, f"{len(self.names)} sources"),
        ]

    def _row(self, row: str) -> pd.Series | Line:
        """A row's values of the items that all sources scored, or a line that says why not."""
        import pandas as pd

        try:
            found = self.items[KEYS].merge(self._values(row), on=KEYS, how="left")
        except ValueError as error:
            return Line(self.suite, row, GAP, reason=str(error))
        if found[row].isna().any():
            return Line(self.suite, row, GAP, reason="not measured: not every item was scored")
        return pd.Series(found[row])

    def gap(self, row: str) -> Line:
        r"""How much of the way from the best single source to the item oracle a row went.

            (score(row) − score(best)) / (score(oracle) − score(best)),    scores signed

        1 is the oracle's score, 0 the best source's, below 0 is worse than that. The interval:
        percentiles of 10,000 draws of items (clusters) within tasks, the best source as it is. No
        value where more than 2.5 % of the draws have no such way.
        """
        values = self._row(row)
        if isinstance(values, Line):
            return values
        best, oracle, own = (v * self.sign for v in (self.items[self.best], self.oracle, values))
        room = self._score(oracle - best)
        if room <= 0:
            what = f"no gap: {self.best} is as good as any source on every item"
            return Line(self.suite, row, GAP, reason=what)
        ends = self._gap_interval(row, own - best, oracle - best)
        if ends is None:
            what = (
                f"no gap to speak of: too few items on which any source is better than {self.best}"
            )
            return Line(self.suite, row, GAP, reason=what)
        value = self._score(own - best) / room
        return Line(self.suite, row, GAP, value, *ends, len(self.items), f"over {self.best}")

    def _gap_interval(
        self, row: str, gain: pd.Series, room: pd.Series
    ) -> tuple[float | None, float | None] | None:
        """No limits where a task has one cluster or draws reach a room of nothing; None if more do
        than a 95 % interval leaves out at an end.
        """
        import numpy as np

        from reports.bootstrap import drawn
        from reports.statistics import DRAWS
        from reports.table import _generator

        rng = _generator(self.suite, row, GAP)
        weight = self.items.weight
        parts = self.items.assign(gain=gain * weight, room=room * weight)
        means: np.ndarray = np.zeros((DRAWS, 2))
        for _, task in parts.groupby("task", sort=False):
            clusters = task.groupby("cluster", sort=False)[["gain", "room", "weight"]].sum()
            if len(clusters) < 2:
                return None, None
            sums = drawn(clusters.to_numpy(), rng, DRAWS)
            means += sums[:, :2] / sums[:, 2:]
        nothing = float((means[:, 1] <= 0).mean())
        if nothing > 0:
            return None if nothing > 0.025 else (None, None)
        low, high = np.quantile(means[:, 0] / means[:, 1], [0.025, 0.975])
        return float(low), float(high)

    def forgotten(self, row: str, target: str) -> Line:
        """Of the items that the target had right, the share that the row has wrong."""
        if (target, self.suite) not in self.opened:
            what = f"not measured: the target {target} has no records"
            return Line(self.suite, row, FORGOTTEN, reason=what)
        before, now = self._row(target), self._row(row)
        for found in (before, now):
            if isinstance(found, Line):
                return Line(self.suite, row, FORGOTTEN, reason=found.reason)
        return self._share(row, FORGOTTEN, before == 1, now == 0, f"{target} had right")

    def emergent(self, row: str) -> Line:
        """Of the items that no source had right, the share that the row has right."""
        now = self._row(row)
        if isinstance(now, Line):
            return Line(self.suite, row, EMERGENT, reason=now.reason)
        none = (self.items[self.names] == 0).all(axis=1)
        return self._share(row, EMERGENT, none, now == 1, "no source had right")

    def _share(self, row: str, name: str, among: Any, hit: Any, what: str) -> Line:
        """A share of items pooled over tasks, with its Wilson interval by clusters."""
        from reports.statistics import score_interval
        from reports.table import _generator

        n, count = int(among.sum()), int((among & hit).sum())
        if not n:
            return Line(self.suite, row, name, reason=f"there is no item that {what}")
        clusters = self.items.task[among] + "\0" + self.items.cluster[among].astype(str)
        low, high = score_interval(
            hit[among].astype(float), _generator(self.suite, row, name), clusters=clusters
        ) or (None, None)
        detail = f"{count} of {n} that {what}"
        return Line(self.suite, row, name, count / n, low, high, n, detail)
