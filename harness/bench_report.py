"""The report of a million records: reading, statistics and the page, in seconds.

Twenty rows answer the same made-up questions, right or wrong, in tasks of a thousand; the answers
of rows agree about as much as those of trained variants do.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.progress import say
from harness.samples import SCORES

ROWS, TASKS, ITEMS = 20, 50, 1_000
ASKED = 10.0  # seconds for all of it


def report() -> None:
    """Read 1,000,000 records of one suite, compare every row with the first, write the page."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        index = _store(home)
        started = time.perf_counter(), time.process_time()
        from reports.html import page
        from reports.table import read

        imported = time.perf_counter()
        found = read(index)
        done = time.perf_counter()
        size = len(page(found).encode())
        ended = time.perf_counter(), time.process_time()
    say(
        f"report of {ROWS * TASKS * ITEMS:,} records, {ROWS} rows (asked for {ASKED:.0f} s)  "
        f"{ended[0] - started[0]:.1f} s, {ended[1] - started[1]:.1f} of processor time: imports "
        f"{imported - started[0]:.1f}, reading and statistics {done - imported:.1f}, page "
        f"{ended[0] - done:.1f}; {size / 1e6:.2f} MB"
    )


def _store(home: Path) -> Path:
    """An index and its finished evaluations, as `kfuse run` leaves them but for raw records."""
    generator = np.random.default_rng(17)
    tasks = [
        {"task": f"task{number:02}", "title": f"Task {number}", "metric": "acc", "chance": 0.25}
        | {"higher_is_better": True, "shots": 0, "n": ITEMS, "n_total": ITEMS, "protocol": "t"}
        for number in range(TASKS)
    ]
    names = np.repeat([task["task"] for task in tasks], ITEMS)
    right = generator.random(TASKS * ITEMS) < 0.5
    cells = {}
    for row in range(ROWS):
        flipped = generator.random(TASKS * ITEMS) < 0.1
        frame = pd.DataFrame(
            {
                "task": names,
                "doc_id": np.tile(np.arange(ITEMS), TASKS),
                "cluster": np.tile(np.arange(ITEMS), TASKS).astype(str),
                "metric": "acc",
                "value": (right ^ flipped).astype(float),
                "weight": 1.0,
                "outcome": "ok",
                "extracted": None,
            }
        )
        where = home / "evaluations" / f"row{row:02}-made"
        where.mkdir(parents=True)
        frame.to_parquet(where / SCORES)
        (where / "manifest.json").write_text(json.dumps(_manifest(f"row{row:02}", tasks)))
        cells[f"row{row:02}"] = {"made": {"run": f"evaluations/{where.name}"}}
    suite = {"name": "made", "title": "Made up", "rule": "macro", "tasks": tasks}
    rows = [
        {"name": row, "kind": "source", "summary": "", "identity": row, "captures": []}
        | dict.fromkeys(("folder", "cost", "training_log"))
        for row in cells
    ]
    index: dict[str, Any] = {
        "recipe": "bench",
        "recipe_yaml": "",
        "overrides": [],
        "reference": "row00",
    }
    index |= {"seed": 17, "rows": rows, "suites": [suite], "cells": cells}
    facts: dict[str, Any] = {
        "machine": "",
        "packages": {},
        "commit": None,
        "created": "",
        "seconds": 0,
    }
    path = home / "reports" / "bench" / "index.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(index | {"facts": facts}))
    return path


def _manifest(row: str, tasks: list[dict]) -> dict[str, object]:
    return {
        "kind": "evaluation", "row": row, "suite": "made", "rule": "macro", "protocol": "p",
        "model_identity": row, "seed": 17, "limit": None, "partial": False, "dtype": "float32",
        "lm_eval": "", "tasks": tasks,
    }  # fmt: skip
