"""Raw records of a measurement: Parquet parts in its folder, appended, never changed.

Everything that a metric needs is in them (log-likelihoods and lengths of choices, generations and
why they ended), so that every score can be computed again without the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.store import world

_SAMPLES = pa.schema(
    [
        ("task", pa.string()),
        ("doc_id", pa.int64()),
        ("doc_hash", pa.string()),
        ("prompt_hash", pa.string()),
        ("cluster", pa.string()),
        ("gold", pa.string()),
        ("output_type", pa.string()),
        ("choice_ll", pa.list_(pa.float64())),
        ("choice_greedy", pa.list_(pa.bool_())),
        ("choice_bytes", pa.list_(pa.int64())),
        ("choice_chars", pa.list_(pa.int64())),
        ("text_bytes", pa.int64()),
        ("generation", pa.list_(pa.string())),
        ("finish_reason", pa.list_(pa.string())),
        ("prompt_tokens", pa.int64()),
        ("generated_tokens", pa.int64()),
    ]
)


def parts(folder: Path) -> list[Path]:
    """The record files of a run, in order; one that an interruption cut is removed."""
    whole = []
    for path in sorted(folder.glob("samples-*.parquet")):
        try:
            pq.read_metadata(path)
            whole.append(path)
        except (OSError, pa.ArrowInvalid):
            path.unlink()
    return whole


def append(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write records as one more part, whole or not at all."""
    number = max((int(p.stem.split("-")[1]) for p in parts(folder)), default=-1) + 1
    path = folder / f"samples-{number:05d}.parquet"
    partial = folder / f".{path.name}"
    try:
        pq.write_table(pa.Table.from_pylist(records, schema=_SAMPLES), partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise world(error, path) from error


def columns(folder: Path, names: list[str]) -> list[list]:
    """Some columns of all records so far."""
    tables = [pq.read_table(path, columns=names) for path in parts(folder)]
    if not tables:
        return [[] for _ in names]
    table = pa.concat_tables(tables)
    return [table[name].to_pylist() for name in names]
