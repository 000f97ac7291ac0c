"""Evaluation folders: the manifest, the raw samples and the derived scores of one run.

A folder counts once its `manifest.json` is there. Nothing is repaired or guessed here: what does
not fit is an error that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

# Metrics beside a primary one, by the titles of reports: of problems with that many samples, of a
# judge's verdicts by turn or without regard to lengths, of instructions and of a looser reading.
PASS_METRICS = {"pass@10": "pass@10", "pass@100": "pass@100"}
OTHER_METRICS = {
    "rating": {"rating_turn_1": "first turn", "rating_turn_2": "second turn"},
    "lc_win_rate": {"win_rate": "win rate"},
    "prompt_level_strict_acc": {
        "prompt_level_loose_acc": "prompts, loosely",
        "inst_level_strict_acc": "instructions",
        "inst_level_loose_acc": "instructions, loosely",
    },
}
SAMPLE_KEY = ["task", "doc_id"]
SCORE_KEY = ["task", "doc_id", "metric"]
SCORE_COLUMNS = ("task", "doc_id", "cluster", "metric", "value", "weight", "outcome", "extracted")
TOKEN_METRIC = "nats_per_token"  # of whole texts, weighed by their tokens
MANIFEST_KEYS = ("row", "suite", "protocol", "tasks", "partial", "model_identity")
TASK_KEYS = ("task", "metric", "higher_is_better", "n_total")


@dataclass(frozen=True)
class Run:
    """One row measured on one suite: an evaluation folder that is finished."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """The run in `folder`.

        FileNotFoundError if there is no manifest, ValueError if it is not that of an evaluation.
        """
        path = Path(folder) / "manifest.json"
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; a run is a folder of evaluations/")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: missing, so this measurement is unfinished or the folder is wrong; "
                "evaluate the row again, what was measured is kept"
            )
        manifest = read_json(path)
        found = manifest.get("kind")
        if found != "evaluation":
            raise ValueError(f"{path}: kind is {found!r}; only 'evaluation' can be read as a run")
        _require(path, manifest, MANIFEST_KEYS, "")
        if not isinstance(manifest["tasks"], list) or not manifest["tasks"]:
            raise ValueError(f"{path}: tasks is empty; a run measures at least one task")
        for number, task in enumerate(manifest["tasks"]):
            _require(path, task, TASK_KEYS, f"tasks[{number}].")
        return cls(Path(folder), manifest)


def apart(run: Run) -> list[Run]:
    """What is reported of a run: itself, or each task by itself if its suite takes no average.

    A task is then a suite of its own, SUITE/TASK. What the whole run cost stands with the first,
    and is shown as the whole suite's.
    """
    whole = run.manifest
    if whole.get("rule") != "apart":
        return [run]
    return [
        Run(
            run.folder,
            whole
            | {"suite": apart_name(whole["suite"], task), "tasks": [task]}
            | {"health": task.get("health", {}), "cost": {} if number else whole.get("cost", {})},
        )
        for number, task in enumerate(whole["tasks"])
    ]


def apart_name(suite: str, task: dict[str, Any]) -> str:
    """The name under which a task of a suite without an average is reported."""
    return f"{suite}/{task.get('title', task['task'])}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError if the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it and run again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def read_samples(run: Run | Path | str) -> pd.DataFrame:
    """The raw records of a run, one line an item, in the order they were written.

    FileNotFoundError if there are none, ValueError for a part that is not whole, a missing column
    or an item recorded twice.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    paths = sorted(run.folder.glob("samples-*.parquet"))
    if not paths:
        raise FileNotFoundError(
            f"{run.folder}/samples-*.parquet: no file, though the manifest says the run is "
            "finished; evaluate again (`kfuse run`)"
        )
    import pandas as pd

    frame = pd.concat([_read(path, SAMPLE_KEY, sealed=True) for path in paths], ignore_index=True)
    _no_duplicates(run.folder / "samples-*.parquet", frame, SAMPLE_KEY)
    return frame


def read_pack(
    run: Run, names: Collection[str], sealed: bool
) -> dict[tuple[str, int], dict[str, Any]]:
    """Records of some parts of a run by (task, doc_id); a part that the run lacks gives none.

    sealed: hold each part to its seal, as `read_samples` does. ValueError names a bad part.
    """
    out = {}
    for name in names:
        path = run.folder / name
        if path.is_file():
            for record in _table(path, SAMPLE_KEY, sealed).to_pylist():
                out[record["task"], record["doc_id"]] = record
    return out


def read_prompts(path: Path, wanted: Collection[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """What the model was asked, of the items that are wanted, by (task, doc_id)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; `kfuse report` writes it again")
    frame = _read(path, (*SAMPLE_KEY, "prompt"))
    frame = frame[frame.doc_id.isin({doc_id for _, doc_id in wanted})]
    rows = zip(frame.task, frame.doc_id, frame.prompt, strict=True)
    return {(task, doc_id): text for task, doc_id, text in rows if (task, doc_id) in wanted}


def read_scores(run: Run | Path | str) -> pd.DataFrame:
    """The derived scores of a run, one line an item and metric; a value of NaN is not scored.

    Metrics of a corpus have `counts`, which other runs lack (`corpus`). FileNotFoundError if the
    file is missing, ValueError if it is not Parquet, lacks a column, scores an item twice, or holds
    an infinite value or a weight that is not positive.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    path = run.folder / "scores.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; evaluate the row again to derive it")
    frame = _read(path, SCORE_COLUMNS)
    _no_duplicates(path, frame, SCORE_KEY)
    frame = frame.astype({"value": "float64", "weight": "float64"})
    scored = frame[frame.value.notna()]
    for name, wrong in (
        ("value", scored.value.abs() == float("inf")),
        ("weight", ~(scored.weight > 0) | (scored.weight == float("inf"))),
    ):
        if wrong.any():
            bad = scored[wrong].iloc[0]
            raise ValueError(
                f"{path}: {name} of item {bad.doc_id} of {bad.task} is {bad[name]}; values are "
                "finite or NaN (not scored), weights finite and positive"
            )
    return frame


def read_primary(run: Run) -> pd.DataFrame:
    """The scores of each task's primary metric only: what suite scores are made of."""
    frame = read_scores(run)
    metrics = {task["task"]: task["metric"] for task in run.manifest["tasks"]}
    return frame[frame.metric == frame.task.map(metrics)].reset_index(drop=True)


def unscored(run: Run, frame: pd.DataFrame, scored: pd.DataFrame) -> list[str]:
    """Titles of a run's tasks that have no item among the scored ones of its frame.

    Without them there is no average. A small sample may leave tasks out altogether; those do not
    count.
    """
    drawn = set(frame.task.unique()) if run.manifest.get("partial") else None
    there = set(scored.task.unique())
    return [
        task.get("title", task["task"])
        for task in run.manifest["tasks"]
        if (drawn is None or task["task"] in drawn) and task["task"] not in there
    ]


def token_perplexities(run: Run) -> dict[str, float]:
    """exp of the mean nats a token, by task; no entry for a task whose tokens nobody counted.

    A token is one of the row's own tokenizer, so that rows of unlike tokenizers do not compare.
    """
    import numpy as np

    frame = read_scores(run)
    frame = frame[(frame.metric == TOKEN_METRIC) & frame.value.notna()]
    return {
        str(task): float(np.exp(np.average(some.value, weights=some.weight)))
        for task, some in frame.groupby("task", sort=False)
    }


def read_training_log(path: Path) -> dict[str, tuple[float, ...]]:
    """The columns of a training log (CSV); a field left empty is NaN.

    FileNotFoundError if there is none, ValueError if it has no `step` or holds text.
    """
    import pandas as pd

    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing training log")
    try:
        frame = pd.read_csv(path).astype("float64")
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{path}: not a training log ({error})") from error
    if "step" not in frame:
        raise ValueError(f"{path}: no column 'step'; found {', '.join(map(str, frame.columns))}")
    return {str(name): tuple(frame[name].tolist()) for name in frame.columns}


def _read(path: Path, columns: tuple[str, ...] | list[str], sealed: bool = False) -> pd.DataFrame:
    return _table(path, columns, sealed).to_pandas()


def _table(path: Path, columns: tuple[str, ...] | list[str], sealed: bool = False) -> pa.Table:
    """A Parquet file with these columns; sealed: where it carries a seal, that must be whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"{path}: not a readable Parquet file ({error}); evaluate again (`kfuse run`): only "
            "what is damaged is measured"
        ) from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        found = ", ".join(table.column_names)
        raise ValueError(f"{path}: no column {', '.join(missing)}; found {found}")
    if sealed and b"kfuse" in (table.schema.metadata or {}):
        from reports.parts import decode

        try:
            decode(path)
        except ValueError as error:
            raise ValueError(
                f"{path}: {error}; evaluate again (`kfuse run`): only what is damaged is measured"
            ) from error
    return table


def _no_duplicates(path: Path, frame: pd.DataFrame, key: list[str]) -> None:
    twice = frame.duplicated(key)
    if twice.any():
        first = ", ".join(f"{name} {frame[twice].iloc[0][name]}" for name in key)
        raise ValueError(
            f"{path}: {int(twice.sum())} duplicate records, the first is {first}; every item is "
            "measured once"
        )


def _require(path: Path, content: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    missing = [where + key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing; evaluate the row again")
