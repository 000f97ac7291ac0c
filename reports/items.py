"""The item browser: questions on which rows differ, with prompt, both answers and their outcomes.

Everything that the page's script needs is chosen and cut here, so that a page stays small: some
packs of each suite are read, and from their items as many as fit, every pair of rows in its turn.
The counts beside them are of all items.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reports.cells import Column, Report
from reports.compare import answer
from reports.panels import Draw, Panel
from reports.records import Run, apart, read_pack, read_primary, read_prompts
from reports.signature import differences
from reports.untrusted import plain, script_json

BUDGET = 900_000  # bytes of all suites together
PROMPT, ANSWER = 2_400, 800  # longest texts shown
OPENED = 600  # parts of samples that a page opens; a part takes about a millisecond
TURNS = 400  # items that a pair of rows may bring
CHECKED = 150  # parts up to which each is held to its seal, which takes ten


@dataclass
class Measured:
    """A suite's comparable runs: values (items, rows), NaN where a row has no score."""

    column: Column
    rows: list[str]
    groups: list[int]  # rows of one number were asked the same
    runs: list[Run]
    keys: list[tuple[str, int]]  # task, doc_id
    values: np.ndarray
    outcomes: np.ndarray
    extracted: np.ndarray


def items(report: Report) -> Panel | None:
    """Choose two rows and a suite, and read the questions on which they differ."""
    suites = [found for column in report.columns if (found := _measured(report, column))]
    if not suites:
        return None
    texts = Texts()
    parts = OPENED // sum(len(suite.runs) for suite in suites)
    listed: list[dict[str, Any]] = []
    damaged: list[str] = []
    for suite in suites:
        counts = _counts(suite)
        budget = BUDGET // len(suites)
        some = (counts > 0).any()
        shown: list[dict[str, Any]] = []
        try:
            shown = list(_shown(report, suite, max(1, parts), budget, texts)) if some else []
        except (ValueError, FileNotFoundError) as error:  # damaged since it was measured
            damaged.append(f"Not shown: {suite.column.name}: {error}.")
        listed.append(
            {
                "name": plain(suite.column.name, 200),
                "title": plain(suite.column.title, 200),
                "fraction": bool(suite.column.unit),
                "rows": [plain(row, 200) for row in suite.rows],
                "groups": suite.groups,
                "differ": counts.tolist(),
                "items": shown,
            }
        )
    text = (
        "Questions on which two rows have another score, a sample of them. Long texts are cut in "
        "the middle; kfuse compare lists all items.",
        *damaged,
    )
    listed = [entry for entry in listed if entry["items"]]
    if not listed:
        return Panel("Items where rows differ", tuple(damaged)) if damaged else None
    data = {"suites": listed, "texts": texts.listed}
    return Panel("Items where rows differ", text, data=data)


class Texts:
    """Each text once, known by its number."""

    def __init__(self) -> None:
        self.listed: list[str] = []
        self.places: dict[str, int] = {}
        self.size = 0

    def place(self, text: str | None) -> int:
        """The number of a text; −1 for none."""
        if text is None:
            return -1
        if text not in self.places:
            self.places[text] = len(self.listed)
            self.listed.append(text)
            self.size += len(script_json(text)) + 1
        return self.places[text]


def _measured(report: Report, column: Column) -> Measured | None:
    """The runs of one suite side by side; None where fewer than two rows were measured."""
    cells = [report.cell(row["name"], column.name) for row in report.rows]
    cells = [cell for cell in cells if cell.run]
    if len(cells) < 2:
        return None
    runs = [
        run
        for cell in cells
        for run in apart(Run.open(Path(report.home) / cell.run))
        if run.manifest["suite"] == column.name
    ]
    groups: list[int] = []
    for number, run in enumerate(runs):
        like = (
            first
            for first in dict.fromkeys(groups)
            if not differences(run.manifest, runs[first].manifest)
        )
        groups.append(next(like, number))
    frames = [read_primary(run).set_index(["task", "doc_id"]) for run in runs]
    keys = frames[0].index
    for frame in frames[1:]:
        keys = keys if keys.equals(frame.index) else keys.union(frame.index, sort=False)
    frames = [frame if frame.index.equals(keys) else frame.reindex(keys) for frame in frames]
    return Measured(
        column,
        [cell.row for cell in cells],
        groups,
        runs,
        [(str(task), int(doc_id)) for task, doc_id in keys],
        np.stack([frame["value"].to_numpy(np.float64) for frame in frames], axis=1),
        np.stack([frame["outcome"].to_numpy(object) for frame in frames], axis=1),
        np.stack([frame["extracted"].to_numpy(object) for frame in frames], axis=1),
    )


def _unlike(suite: Measured, one: int, other: int) -> np.ndarray:
    """How far two rows are apart on each item; 0 where equal, not scored or not comparable."""
    if suite.groups[one] != suite.groups[other]:
        return np.zeros(len(suite.values))
    return np.nan_to_num(np.abs(suite.values[:, one] - suite.values[:, other]), nan=0.0)


def _counts(suite: Measured) -> np.ndarray:
    """(rows, rows) how many items differ; −1 where the rows were not asked the same."""
    size = len(suite.rows)
    out = np.zeros((size, size), dtype=int)
    for one in range(size):
        for other in range(size):
            alike = suite.groups[one] == suite.groups[other]
            out[one, other] = (_unlike(suite, one, other) > 0).sum() if alike else -1
    return out


def _shown(
    report: Report, suite: Measured, parts: int, budget: int, texts: Texts
) -> Iterator[dict[str, Any]]:
    """Items of a suite until the budget is spent."""
    chosen = _packs(suite, parts)
    checked = len(chosen) * len(suite.runs) <= CHECKED
    records = [read_pack(run, chosen, checked) for run in suite.runs]
    known = set().union(*records)
    order = _in_turn(suite, np.array([key in known for key in suite.keys]))
    where = report.extra.get("prompts", {}).get(suite.column.whole, {})
    prompts: dict[str, Mapping[tuple[str, int], str]] = {}
    for protocol in {run.manifest["protocol"] for run in suite.runs}:
        if protocol in where:
            wanted = {suite.keys[place] for place in order}
            prompts[protocol] = read_prompts(Path(report.home) / where[protocol], wanted)
    spent = -texts.size
    for place in order:
        item = _item(suite, place, records, prompts, texts)
        spent += len(script_json(item))
        if spent + texts.size > budget:
            return
        yield item


def _packs(suite: Measured, parts: int) -> list[str]:
    """Names of the files of samples that are read: a seeded draw, the same for every run."""
    names = sorted({path.name for run in suite.runs for path in run.folder.glob("samples-*")})
    generator = np.random.default_rng(zlib.crc32(suite.column.name.encode()))
    return [names[i] for i in sorted(generator.permutation(len(names))[:parts])]


def _in_turn(suite: Measured, read: np.ndarray) -> list[int]:
    """Items that differ, of those read: from each pair of rows in its turn the furthest apart."""
    generator = np.random.default_rng(zlib.crc32(suite.column.name.encode()))
    queues = []
    for one in range(len(suite.rows)):
        for other in range(one):
            apart = np.where(read, _unlike(suite, one, other), 0.0)
            differ = generator.permutation(np.flatnonzero(apart))
            queues.append(differ[np.argsort(-apart[differ], kind="stable")][:TURNS])
    longest = max((len(queue) for queue in queues), default=0)
    turn = [queue[at] for at in range(longest) for queue in queues if at < len(queue)]
    return [int(place) for place in dict.fromkeys(turn)]


def _item(
    suite: Measured,
    place: int,
    records: Sequence[Mapping[tuple[str, int], dict[str, Any]]],
    prompts: Mapping[str, Mapping[tuple[str, int], str]],
    texts: Texts,
) -> dict[str, Any]:
    """One question: prompts by row, and of each row value, outcome, answer and what was found."""
    key = suite.keys[place]
    said: list[list[Any] | None] = []
    asked: list[int] = []
    gold = None
    for number, run in enumerate(suite.runs):
        record = records[number].get(key)
        prompt = prompts.get(run.manifest["protocol"], {}).get(key)
        asked.append(texts.place(None if prompt is None else plain(prompt, PROMPT)))
        value = suite.values[place, number]
        if record is None or np.isnan(value):
            said.append(None)
            continue
        metric = next(t["metric"] for t in run.manifest["tasks"] if t["task"] == key[0])
        found = suite.extracted[place, number]
        gold = record.get("gold") if gold is None else gold
        said.append(
            [
                round(float(value), 6),
                plain(str(suite.outcomes[place, number]), 100),
                texts.place(plain(answer(record, metric), ANSWER)),
                texts.place(plain(found, ANSWER) if isinstance(found, str) else None),
            ]
        )
    shown = None if gold in (None, "null") else plain(str(gold), ANSWER)
    listed = [task for run in suite.runs for task in run.manifest["tasks"]]
    title = next(task.get("title", key[0]) for task in listed if task["task"] == key[0])
    item = {"task": plain(title, 200), "id": key[1], "gold": texts.place(shown)}
    return item | {"asked": asked, "said": said}


PANELS: dict[str, Draw] = {"items": items}
