"""Raw records of a measurement in its folder: a part a pack, and a ledger of what they cost.

Everything that a metric needs is in the parts (log-likelihoods and lengths of choices, generations
and why they ended), so that every score can be computed again without the model. A part is written
whole or not at all and is the same bytes whoever writes it, so any number of processes may work on
one folder. What depends on the occasion (seconds, tokens, the engine) is in the ledger, a line for
each pack that was measured, however often.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.errors import RunError
from harness import mirror
from harness.locks import owned
from harness.progress import say
from harness.store import beside, world
from reports.parts import decode, encode
from reports.records import Run

LEDGER = mirror.ALONE
SCORES = "scores.parquet"


def part(folder: Path, number: int) -> Path:
    """Where a pack's records are."""
    return folder / f"samples-{number:05d}.parquet"


def parts(folder: Path) -> list[Path]:
    """The record files of a measurement, in order."""
    return sorted(folder.glob("samples-*.parquet"))


def problem(folder: Path, label: Mapping[str, Any]) -> str | None:
    """What is wrong with a pack's part: None if it is there, whole and of these items."""
    path = part(folder, label["pack"])
    try:
        found, _ = decode(path)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        raise world(error, path) from error
    except ValueError as error:
        return str(error)
    differ = [key for key, value in label.items() if found.get(key) != value]
    return f"belongs to something else ({', '.join(differ)} differ)" if differ else None


def waiting(folder: Path, labels: Sequence[Mapping[str, Any]]) -> list[int]:
    """The packs that are to be measured; a part that is there and wrong is named."""
    out = []
    for label in labels:
        wrong = problem(folder, label)
        if wrong:
            out.append(int(label["pack"]))
        if wrong and wrong != "missing":
            say(f"{part(folder, label['pack'])}: {wrong}; its items are measured again")
    return out


def write(folder: Path, records: list[dict[str, Any]], label: Mapping[str, Any]) -> None:
    """Write a pack's part, whole or not at all."""
    path = part(folder, label["pack"])
    partial = beside(path)
    try:
        partial.write_bytes(encode(records, label))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise world(error, path) from error


def read(folder: Path, labels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All records. RunError names the first part that is not whole, and what to do."""
    out: list[dict[str, Any]] = []
    for label in labels:
        path = part(folder, label["pack"])
        wrong = problem(folder, label)
        if wrong:
            raise RunError(
                f"{path}: {wrong}; evaluate again (`kfuse run`): only what is damaged is measured"
            )
        out += decode(path)[1]
    return out


def seals(folder: Path) -> dict[str, list[Any]]:
    """Size and sha256 of each file that a measurement's numbers come from, for its manifest.

    Scores are among them, though they can be derived again: a report reads nothing else.
    """
    return {path.name: _seal(path) for path in [*parts(folder), folder / SCORES]}


def _seal(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def damage(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with a finished measurement's files, by name; empty if they are as they were.

    A manifest of an older version, which seals nothing, is believed.
    """
    try:
        Run.open(folder)
    except (FileNotFoundError, ValueError) as error:
        return {"manifest.json": str(error).removeprefix(f"{folder / 'manifest.json'}: ")}
    out = {}
    sealed = manifest.get("seals", {})
    for name, (size, digest) in sealed.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                out[name] = f"has {path.stat().st_size} bytes, had {size}"
            elif _seal(path)[1] != digest:
                out[name] = "its bytes are not those that were written"
        except FileNotFoundError:
            out[name] = "is gone"
        except OSError as error:
            raise world(error, path) from error
    strange = [path.name for path in parts(folder) if sealed and path.name not in sealed]
    return out | dict.fromkeys(strange, "was not there")


def set_aside(folder: Path, count: int) -> None:
    """Rename parts beyond the last pack, which no measurement of today wrote, and say so."""
    for path in parts(folder):
        number = path.stem.partition("-")[2]
        if not number.isdigit() or int(number) >= count:
            other = path.with_name(f"other-{path.name}")
            try:
                path.rename(other)
            except FileNotFoundError:  # another process was faster
                continue
            except OSError as error:
                raise world(error, path) from error
            say(f"{path}: no part of this measurement of {count} packs; renamed to {other.name}")


def spend(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add a line to the ledger: what measuring a pack once took, and on what."""
    path = folder / LEDGER
    try:  # machines that share a folder append where each believes its end to be
        with owned(folder.parent.parent, f"{folder.name}.ledger"):
            mirror.bring(path)
            with path.open("ab") as ledger:
                ledger.write(b"\n" + json.dumps(entry, default=str).encode() + b"\n")
            mirror.send(path)
    except OSError as error:
        raise world(error, path) from error


def spent(folder: Path) -> list[dict[str, Any]]:
    """The ledger's lines; one that an interruption cut is left out."""
    mirror.bring(folder / LEDGER)
    try:
        lines = (folder / LEDGER).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    out = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"pack", "seconds", "tokens"} <= set(entry):
            out.append(entry)
    return out
