"""The file format of raw records: a Parquet part that knows what it is and whether it is whole.

A part holds one pack of items. Its Parquet metadata carry a label (which measurement, which pack of
how many, which items) and a sha256 of label and records. Encoding is deterministic, so a part is
right exactly if encoding what was read from it gives its bytes again: a flipped byte anywhere is
found, also where no record would change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("doc_id", pa.int64()),
        ("protocol", pa.string()),
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
        ("generated_tokens", pa.int64()),
        ("text_tokens", pa.int64()),  # that a whole text was cut into; null where nobody knows
    ]
)
ADDED = ("text_tokens",)  # columns that parts of earlier versions lack; read as null
_KEY = b"kfuse"


def encode(records: Sequence[Mapping[str, Any]], label: Mapping[str, Any]) -> bytes:
    """The bytes of a part: the same for the same records, label and version of pyarrow."""
    table = pa.Table.from_pylist(list(records), schema=SCHEMA)
    return _encode(table, {**label, "writer": pa.__version__})


def _encode(table: pa.Table, label: Mapping[str, Any]) -> bytes:
    sealed = {**label, "sha256": _digest(label, table)}
    text = json.dumps(sealed, sort_keys=True)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_KEY: text.encode()}), sink)
    return sink.getvalue().to_pybytes()


def _digest(label: Mapping[str, Any], table: pa.Table) -> str:
    text = json.dumps([dict(label), table.to_pylist()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def decode(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A part's label and records. ValueError says in a few words what is wrong with it.

    What another version of pyarrow wrote is held to its sha256 alone.
    """
    data = path.read_bytes()
    try:
        table = pq.read_table(pa.BufferReader(data))
        sealed = json.loads((table.schema.metadata or {}).get(_KEY, b"null"))
        absent = [name for name in ADDED if name not in table.column_names]
        whole = table.cast(pa.schema([field for field in SCHEMA if field.name not in absent]))
    except (OSError, pa.ArrowException, ValueError, MemoryError) as error:
        what = " ".join(str(error).split())[:120]
        raise ValueError(f"no whole Parquet file of records ({what})") from error
    if not isinstance(sealed, dict) or "sha256" not in sealed:
        raise ValueError("carries no label, so nobody can say whether it is whole")
    label = {key: value for key, value in sealed.items() if key != "sha256"}
    if sealed["sha256"] != _digest(label, whole):
        raise ValueError("its records are not those that were written (sha256 differs)")
    if label.get("writer") == pa.__version__ and _encode(whole, label) != data:
        raise ValueError("its bytes are not those that were written")
    return label, [dict.fromkeys(absent) | record for record in whole.to_pylist()]
