"""Checkpoints as files: merge several model folders into one, and identify a folder by content.

Weights are read from memory-mapped safetensors, one file or shards with their index, and written
one tensor at a time, so memory holds a few of the largest tensor and never a model. Arithmetic is
float32; how tensors combine is `merging.py`. Whether the models fit together is checked before any
work. Which bytes come out depends on the tensors alone, never on how the inputs were cut in shards.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusion.cards import describe
from fusion.compatibility import FLOATS, differences, pad_vocabulary, refuse_mismatches
from fusion.errors import RecipeError, RunError
from fusion.geometry import EMBEDDINGS
from fusion.merging import MERGE_METHODS, context, needs_base
from fusion.models import DTYPES
from fusion.statistics import opened_statistics
from fusion.streaming import Merging

SHARD_BYTES = 2_000_000_000  # tensor bytes in one written file, at most, if no tensor is larger
INDEX = "model.safetensors.index.json"
# What belongs to a model beside its weights: copied by a merge, counted by its identity.
_BESIDE = "config.json generation_config.json tokenizer* special_tokens_map.json added_tokens.json"
_BESIDE += " vocab.* merges.txt *.model *.spm chat_template*"
DTYPES_OF = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Entry = tuple[str, int, tuple[int, ...]]  # a tensor to write: type as BF16, bytes of all, shape
Merged = Callable[[Sequence[str]], Iterator[Tensor]]  # named tensors, in consecutive pieces
_DERIVED = "rotary_emb.inv_freq"  # old checkpoints store it; it follows from the configuration


class Checkpoint:
    """The tensors of one model folder, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}
        for path, listed in weight_files(folder).items():
            with _reading(path):
                opened = stack.enter_context(safe_open(path, framework="pt"))
                held = opened.keys()
            if missing := sorted(listed - set(held)):
                raise RunError(
                    f"{path}: lacks {missing[0]} and {len(missing) - 1} more that {INDEX} lists; "
                    "fetch or build the folder again"
                )
            self.files |= {name: opened for name in held if not name.endswith(_DERIVED)}
        self.mapped: dict[str, Tensor] = {}
        self.stored_as: dict[str, str] = {}  # a tied head and the embedding that it is
        self.rows: dict[str, int] = {}  # of embeddings that are cut or extended
        self.donors: Sequence[Checkpoint] = ()  # whose rows extend them, the first that has one

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        stored = self.stored(name)
        return (self.rows.get(name, stored[0]), *stored[1:]) if stored else stored

    def stored(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in its file."""
        return tuple(self._slice(name).get_shape())

    def code(self, name: str) -> str:
        """Element type of a tensor as safetensors calls it, such as BF16."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """One tensor as stored, or its rows from start to below stop; a view, not to be written."""
        with _reading(self.folder):
            if name in self.rows:
                stop = self.rows[name] if stop is None else stop
                return self._extended(name, start, stop)
            if name not in self.mapped:  # a view of the file, which takes a while to come by
                stored_as = self.stored_as.get(name, name)
                self.mapped[name] = self.files[name].get_tensor(stored_as)
            return self.mapped[name] if stop is None else self.mapped[name][start:stop]

    def _extended(self, name: str, start: int, stop: int) -> Tensor:
        parts = []
        for donor in (self, *self.donors):
            end = min(stop, donor.stored(name)[0])
            if start < end:
                parts.append(donor._slice(name)[start:end].to(DTYPES_OF[self.code(name)]))
                start = end
        return torch.cat(parts)

    def embedding(self) -> str | None:
        """Name of the input embedding."""
        return next((name for name in sorted(self.files) if name.endswith(EMBEDDINGS)), None)

    def ties(self, head: str) -> bool:
        """Whether the output head is the input embedding: not stored, or stored the same."""
        embedding = self.embedding()
        if head not in self.files or embedding is None:
            return head not in self.files
        same = self.shape(head) == self.shape(embedding)
        return same and self.read(head).equal(self.read(embedding))

    def _slice(self, name: str) -> Any:
        return self.files[name].get_slice(self.stored_as.get(name, name))


def merge(
    folders: Sequence[Path],
    base: Path | None,
    out: Path,
    method: str,
    parameters: Mapping[str, Any],
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    pad: str | None = None,
    rows: Sequence[str] | None = None,
    statistics: Sequence[Path] = (),
    models: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Merge model folders into the folder `out`; facts: tensors, parameters, bytes, files, notes.

    `dtype` is that of the written weights. Configuration, tokenizer and generation configuration
    are those of the base, or of the first folder; `notes` say where others differ from them without
    hindering. Embeddings of unequal size are refused unless `pad` says how to make them equal:
    trim them to the rows that all have, or extend them by the rows of the first model that has
    them, the base first. `merge.yaml` and README.md in `out` say what was merged, by the names
    `rows` (by default the folders'; the base's, if there is one, is the last). `statistics`:
    folders of `statistics.collect`, one a model, if the method takes them. `models`: what tells
    the models apart in draws, by default their content, which is read for it. Everything is written
    in a hidden folder beside `out` and moved when whole; a manifest is the caller's.
    RecipeError if the method refuses its parameters; RunError if the models do not fit together,
    with all mismatches, or a file is damaged.
    """
    _try_out(method, parameters, len(folders), base is not None)
    origin = base or folders[0]
    if out.resolve() in {folder.resolve() for folder in (*folders, origin)}:
        raise RunError(f"{out}: is one of the models to merge; write to another folder")
    with ExitStack() as stack:
        opened = {f: Checkpoint(f, stack) for f in dict.fromkeys((origin, *folders))}
        unique = len({folder.name for folder in opened}) == len(opened)
        named = {folder.name if unique else str(folder): c for folder, c in opened.items()}
        config = read_config(origin)
        if pad:
            config |= pad_vocabulary(named, pad)
        refuse_mismatches(named, config)
        notes = differences(named)
        inputs = [opened[folder] for folder in folders]

        floats = [n for n in sorted(opened[origin].files) if opened[origin].code(n) in FLOATS]
        keys = None
        if "models" in context(method):
            keys = list(models or (identity(folder) for folder in folders))
        ground = opened[base] if base else None

        entries: dict[str, Entry] = {}
        for name in sorted(opened[origin].files):
            code, shape = opened[origin].code(name), opened[origin].shape(name)
            if code in FLOATS:
                size = DTYPES[dtype].itemsize * prod(shape)
                entries[name] = (_CODES[dtype], size, shape)
            else:
                entries[name] = (code, inputs[0].read(name).nbytes, shape)
        collected = opened_statistics(statistics, method, folders, inputs, stack)
        work = Merging(inputs, ground, method, parameters, floats, keys, collected)
        with published(out) as partial, work:
            merged = functools.partial(work.pieces, dtype=DTYPES[dtype])
            facts = write_tensors(partial, entries, merged, shard_bytes)
            _copy_beside(origin, partial, {**config, "dtype": dtype})
            names = list(rows or (folder.name for folder in (*folders, origin)))
            section = {
                "inputs": names[: len(folders)],
                "base": names[-1] if base else None,
                "method": method,
                "parameters": dict(parameters),
                "pad": pad,
                "dtype": dtype,
            }
            describe(partial, section, notes)
    return facts | {"notes": notes}


def _try_out(method: str, parameters: Mapping[str, Any], count: int, based: bool) -> None:
    """Let the method refuse its parameters on a tensor of two elements, before any work."""
    if method not in MERGE_METHODS:
        known = ", ".join(MERGE_METHODS)
        raise RecipeError(f"merge method '{method}' is unknown; known: {known}")
    if needs_base(method) and not based:
        raise RecipeError(f"merge method {method} works on changes against a base; name one")
    one = torch.ones(2)
    try:
        MERGE_METHODS[method]([one] * count, one if based else None, **parameters)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"merge method {method}: {error}") from error


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files of a model folder, as transformers would choose them.

    With each, the tensors that the index lists in it. Raises RunError if there is no file, or if
    there are several and no index says which belong.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():
        return {single: set()}
    if not index.exists():
        found = sorted(folder.glob("*.safetensors"))
        if len(found) == 1:
            return {found[0]: set()}
        raise RunError(
            f"{folder}: holds {len(found)} .safetensors files and no {INDEX}; load the model with "
            "transformers and save it again with save_pretrained"
        )
    listed: dict[Path, set[str]] = {}
    with _reading(index):
        for name, file in json.loads(index.read_text())["weight_map"].items():
            listed.setdefault(folder / file, set()).add(name)
    if lost := sorted(path.name for path in listed if not path.exists()):
        raise RunError(f"{index}: lists {', '.join(lost)}, not there; fetch or build it again")
    return dict(sorted(listed.items()))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        what = f"{path}: cannot be read ({type(error).__name__}: {error})"
        raise RunError(f"{what}; if it is truncated or damaged, fetch or build it again") from error


def write_tensors(
    out: Path, entries: Mapping[str, Entry], merged: Merged, limit: int
) -> dict[str, Any]:
    """Compute and write tensors in the order of `entries`, in files of at most `limit` bytes."""
    shards: list[list[str]] = []
    room = 0
    for name, (_, size, _) in entries.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(out / file, {name: entries[name] for name in names}, merged)
        where |= dict.fromkeys(names, file)
    total = sum(size for _, size, _ in entries.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (out / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    numbers = sum(prod(shape) for _, _, shape in entries.values())
    return {"tensors": len(entries), "parameters": numbers, "bytes": total, "files": len(shards)}


def _write_file(path: Path, entries: Mapping[str, Entry], merged: Merged) -> None:
    """One safetensors file: length of the header, header, tensors one after another.

    The safetensors package writes whole dictionaries only, which would hold a shard in memory.
    Widest elements come first, so that each tensor lies on a multiple of its element size.
    """
    width = {name: size // max(1, prod(shape)) for name, (_, size, shape) in entries.items()}
    order = sorted(entries, key=lambda name: (-width[name], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        code, size, shape = entries[name]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in merged(order):
            file.write(_bytes(piece).numpy().data)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`; its files move into `out` when all are written."""
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        out.mkdir(exist_ok=True)
        for stale in (*out.glob("*.safetensors"), out / INDEX):
            stale.unlink(missing_ok=True)
        for path in sorted(partial.iterdir()):
            path.replace(out / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's configuration."""
    with _reading(folder / "config.json"):
        return dict(json.loads((folder / "config.json").read_text()))


def _copy_beside(source: Path, out: Path, config: dict[str, Any]) -> None:
    """Everything beside the weights; the configuration says what was written."""
    for path in files_beside(source):
        shutil.copyfile(path, out / path.name)
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def complete(folder: Path, source: Path) -> None:
    """Copy what belongs to a model beside its weights, where the folder has none of its own."""
    for path in files_beside(source):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def files_beside(folder: Path) -> list[Path]:
    found = {path for pattern in _BESIDE.split() for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def identity(folder: Path) -> str:
    """sha256 (hex) of a model by content: weights, configuration, tokenizer.

        sha256(lines [name, type, shape, sha256 of its bytes], a tensor each, names ascending;
               lines [name, sha256 of its bytes], a file beside the weights each, names ascending)

    The same however the weights are cut into files, and in whatever order they lie there. Raises
    RunError if a file is damaged or missing.
    """
    with ExitStack() as stack:
        pieces: dict[str, tuple[list[Any], mmap.mmap, int, int]] = {}
        for path in weight_files(folder):
            with _reading(path):
                mapped, entries = _mapped(path, stack)
            for name, (code, shape, start, end) in entries.items():
                pieces[name] = ([name, code, shape], mapped, start, end)

        def line(name: str) -> list[Any]:
            what, mapped, start, end = pieces[name]
            with memoryview(mapped) as whole, whole[start:end] as part:
                return [*what, hashlib.sha256(part).hexdigest()]

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            lines = list(threads.map(line, sorted(pieces)))
    for path in files_beside(folder):
        lines.append([path.name, hashlib.sha256(path.read_bytes()).hexdigest()])
    return hashlib.sha256("\n".join(map(json.dumps, lines)).encode()).hexdigest()


def _mapped(path: Path, stack: ExitStack) -> tuple[mmap.mmap, dict[str, tuple]]:
    """A safetensors file in memory, and type, shape, first and last byte of each tensor."""
    with safe_open(path, framework="pt"):  # refuses a file that is not whole
        pass
    file = stack.enter_context(path.open("rb"))
    mapped = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    header.pop("__metadata__", None)
    return mapped, {
        name: (e["dtype"], e["shape"], *(start + offset for offset in e["data_offsets"]))
        for name, e in header.items()
    }
