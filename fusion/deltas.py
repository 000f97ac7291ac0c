"""A model kept as a compressed difference from the model it was made from, and made again from it.

With `bits: exact`, each tensor's bytes are combined with the base's by exclusive or and compressed:
what comes back is the model, byte for byte. With a number, matrices are kept by their singular
vectors, the first ones finer than the later ones; everything else stays exact. A folder of the
store so holds `model.delta`, the files beside the weights that are not the base's, and
`delta.json`, written last.

Shapes: m, n rows and columns of a matrix, K kept singular vectors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusion.checkpoints import (
    DTYPES_OF,
    INDEX,
    SHARD_BYTES,
    Checkpoint,
    Entry,
    files_beside,
    identity,
    published,
    write_tensors,
)
from fusion.compatibility import FLOATS
from fusion.errors import RunError

FILE, FACTS = "model.delta", "delta.json"  # safetensors, but not weights as they are
# How many singular vectors, largest first, are kept at how many bits a number; the last are as many
# as there is room for.
FINENESS = ((2, 8), (32, 3), (None, 2))
_DTYPES = DTYPES_OF | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compress(model: Path, base: Path, out: Path, bits: float | str) -> dict[str, Any]:
    r"""Write `model` to `out` as its difference from `base`; facts about it are returned.

        τ = θ − θ_0 ≈ Σ_k u_k v_kᵀ,   v_k the right singular vectors of τ, u_k = τ v_k

    `bits`: what an element of a matrix may take, at most; as many vectors are kept as that has room
    for, the first two at 8 bits a number, 32 at 3, then 2, each with one step width, the best of a
    few by its squared error. u is fitted anew to the rounded v before it is rounded itself. Or
    `exact`. One tensor is in memory at a time, and what is written.

    Facts: bits, bytes of the weights before and after, and the model's, the base's and the file's
    content hashes. RunError if a file is damaged or the difference is not finite; ValueError for
    other bits. Source: Delta-CoMe, 2406.08903. Relative to the paper: there the vectors are rounded
    with calibration data (GPTQ), here to the nearest; its 1/16 of bfloat16 is `bits: 1`.
    """
    if bits != "exact" and not (isinstance(bits, int | float) and 0 < bits <= 16):
        raise ValueError(f"bits is {bits!r}; should be exact, or above 0 and at most 16")
    held: dict[str, Tensor] = {}
    kept: dict[str, Any] = {}
    with ExitStack() as stack:
        new, old = Checkpoint(model, stack), Checkpoint(base, stack)
        for name in sorted(new.files):
            kept[name] = {"dtype": new.code(name), "shape": list(new.shape(name))}
            if new.code(name) not in _DTYPES:
                raise RunError(f"{model}: {name} is {new.code(name)}, which cannot be kept")
            change = None if bits == "exact" else _change(new, old, name)
            if change is None:
                held[f"{name}|exact"] = _packed_bytes(new.read(name), _ground(old, name, new))
                continue
            if not change.isfinite().all():
                raise RunError(f"{model}: {name} is not finite; a broken model cannot be kept")
            kept[name]["vectors"] = _add_vectors(held, name, change, float(bits))
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f".{FILE}"
    save_file(held, partial, metadata={"tensors": json.dumps(kept)})
    partial.replace(out / FILE)
    theirs = {path.name: path.read_bytes() for path in files_beside(base)}
    beside = [path for path in files_beside(model)]
    own = [path for path in beside if theirs.get(path.name) != path.read_bytes()]
    for path in own:
        if path.parent != out:
            shutil.copyfile(path, out / path.name)
    before = sum(prod(e["shape"]) * _DTYPES[e["dtype"]].itemsize for e in kept.values())
    facts = {
        "bits": bits,
        "bytes_before": before,
        "bytes": (out / FILE).stat().st_size,
        "model": identity(model),
        "base": identity(base),
        "sha256": _sha256(out / FILE),
        "beside": [path.name for path in beside],
        "own": [path.name for path in own],
    }
    (out / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def restore(delta: Path, base: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Write the model that a folder of `compress` keeps; its facts, with `restored`, its identity.

    Raises RunError if the delta is damaged, or `base` is not the model that it was taken from.
    """
    facts = read_facts(delta)
    if (found := identity(base)) != facts["base"]:
        raise RunError(
            f"{base}: is not the base that {delta} was taken from (content {found[:8]}, not "
            f"{facts['base'][:8]}); give that model, or build the row again"
        )
    if not (delta / FILE).exists() or _sha256(delta / FILE) != facts["sha256"]:
        raise RunError(f"{delta / FILE}: missing, cut short or changed; build the row again")
    if out.resolve() in (delta.resolve(), base.resolve()):
        raise RunError(f"{out}: is what is restored from; write to another folder")
    with ExitStack() as stack:
        old = Checkpoint(base, stack)
        file = stack.enter_context(_opened(delta / FILE))
        kept: dict[str, Any] = json.loads(file.metadata()["tensors"])
        entries: dict[str, Entry] = {}
        for name, entry in kept.items():
            size = prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
            entries[name] = (entry["dtype"], size, tuple(entry["shape"]))

        def made(names: Sequence[str]) -> Iterator[Tensor]:
            return (_made(file, old, name, kept[name]) for name in names)

        with published(out) as partial:
            write_tensors(partial, entries, made, shard_bytes)
            for name in facts["beside"]:
                shutil.copyfile((delta if name in facts["own"] else base) / name, partial / name)
    restored = identity(out)
    if facts["bits"] == "exact" and restored != facts["model"]:
        raise RunError(f"{out}: did not come out as {delta} was; build the row again")
    return facts | {"restored": restored}


def whole(folder: Path) -> bool:
    """Whether all the weights that a folder's delta keeps lie in it, too; RunError without one."""
    with _opened(folder / FILE) as file:
        kept = json.loads(file.metadata()["tensors"])
    files = list(folder.glob("*.safetensors"))
    if not files or (len(files) > 1 and not (folder / INDEX).exists()):
        return False
    try:
        with ExitStack() as stack:
            return kept.keys() <= Checkpoint(folder, stack).files.keys()
    except RunError:
        return False


def read_facts(delta: Path) -> dict[str, Any]:
    """What `compress` said of a folder; RunError if it keeps no delta."""
    try:
        return dict(json.loads((delta / FACTS).read_text()))
    except (OSError, ValueError) as error:
        raise RunError(f"{delta}: keeps no delta ({FACTS}: {error})") from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: cannot be read ({error}); build the row again") from error


def _change(new: Checkpoint, old: Checkpoint, name: str) -> Tensor | None:
    """A matrix's difference from the base's, float32; None for what stays exact."""
    shape = new.shape(name)
    floats = new.code(name) in FLOATS and name in old.files and old.code(name) in FLOATS
    if len(shape) != 2 or min(shape) < 2 or not floats or old.shape(name) != shape:
        return None
    change = new.read(name).float() - old.read(name).float()
    return change if change.any() else None


def _ground(old: Checkpoint, name: str, new: Checkpoint) -> Tensor | None:
    if name not in old.files or old.shape(name) != new.shape(name):
        return None
    return old.read(name).to(_DTYPES[new.code(name)]) if new.code(name) in FLOATS else None


def _packed_bytes(tensor: Tensor, ground: Tensor | None) -> Tensor:
    """Lowest bytes of all elements, then the next, …, of what differs from the base; zstd."""
    words = tensor.contiguous().view(_WORDS[tensor.element_size()])
    if ground is not None:
        words = words ^ ground.contiguous().view(words.dtype)
    planes = words.reshape(-1, 1).view(torch.uint8).T.contiguous().numpy()
    packed = pa.compress(planes, codec="zstd", asbytes=True)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _unpacked_bytes(packed: Tensor, ground: Tensor | None, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    width = dtype.itemsize
    if not prod(shape):  # which no buffer is
        return torch.empty(shape, dtype=dtype)
    raw = pa.decompress(packed.numpy(), prod(shape) * width, codec="zstd", asbytes=True)
    planes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(width, -1)
    # Of one row or none, `contiguous` would leave strides that no wider type can be read with.
    flat = planes.T.clone(memory_format=torch.contiguous_format).reshape(-1)
    words = flat.view(_WORDS[width]).reshape(shape)
    if ground is not None:
        words = words ^ ground.contiguous().view(words.dtype)
    return words.view(dtype)


def _add_vectors(
    held: dict[str, Tensor], name: str, change: Tensor, bits: float
) -> list[list[int]]:
    """Put a matrix's vectors to what is held; [how many, bits a number] of each group."""
    groups = room(change.shape[0], change.shape[1], bits)
    wide = change.shape[0] < change.shape[1]
    tall = (change.T if wide else change).double()
    _, vectors = torch.linalg.eigh(tall.T @ tall)  # ascending; n ≤ m, so the smaller side
    right = vectors.flip(1)[:, : sum(count for count, _ in groups)]
    at, rounded = 0, []
    for index, (count, width) in enumerate(groups):
        codes, steps = _rounded(right[:, at : at + count].float(), width)
        held[f"{name}|right{index}"], held[f"{name}|right_steps{index}"] = (
            _bits(codes, width),
            steps,
        )
        rounded.append(_numbers(codes, steps, width))
        at += count
    basis = torch.cat(rounded, dim=1).double()
    left = torch.linalg.lstsq(basis.T @ basis, basis.T @ tall.T, driver="gelsd").solution.T
    at = 0
    for index, (count, width) in enumerate(groups):
        codes, steps = _rounded(left[:, at : at + count].float(), width)
        held[f"{name}|left{index}"], held[f"{name}|left_steps{index}"] = _bits(codes, width), steps
        at += count
    return [list(group) for group in groups]


def room(rows: int, columns: int, bits: float) -> list[tuple[int, int]]:
    """(how many vectors, bits a number) that `bits` an element have room for, at least one."""
    left = bits * rows * columns
    rank = min(rows, columns)
    out: list[tuple[int, int]] = []
    for most, width in FINENESS:
        cost = width * (rows + columns) + 64  # two step widths, float32
        count = min(rank, int(left // cost), rank if most is None else most)
        if count:
            out.append((count, width))
            left, rank = left - count * cost, rank - count
    return out or [(1, FINENESS[-1][1])]


def _rounded(vectors: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Codes (m, K) of each column's numbers, and the columns' step widths (K,)."""
    top = (2**width - 1) / 2
    most = vectors.abs().amax(0).clamp_min(1e-30) / top
    best = torch.full_like(most, torch.inf)
    steps = most.clone()
    for share in (1.0,) if width >= 8 else torch.linspace(0.2, 1.0, 17).tolist():
        step = most * share
        error = (_numbers(_codes(vectors, step, top), step, width) - vectors).square().sum(0)
        steps = torch.where(error < best, step, steps)
        best = torch.minimum(best, error)
    return _codes(vectors, steps, top), steps


def _codes(vectors: Tensor, steps: Tensor, top: float) -> Tensor:
    return (vectors / steps + top).round().clamp(0, 2 * top).to(torch.uint8)


def _numbers(codes: Tensor, steps: Tensor, width: int) -> Tensor:
    return (codes.float() - (2**width - 1) / 2) * steps


def _bits(codes: Tensor, width: int) -> Tensor:
    """Codes as bits, one after another, the lowest first, column by column."""
    planes = codes.T.contiguous().numpy().reshape(-1, 1) >> np.arange(width, dtype=np.uint8)
    return torch.from_numpy(np.packbits(planes & 1))


def _unbits(packed: Tensor, width: int, rows: int, count: int) -> Tensor:
    planes = np.unpackbits(packed.numpy(), count=rows * count * width).reshape(-1, width)
    codes = (planes << np.arange(width, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return torch.from_numpy(codes.reshape(count, rows)).T


def _made(file: Any, old: Checkpoint, name: str, entry: Mapping[str, Any]) -> Tensor:
    """One tensor again."""
    dtype = _DTYPES[entry["dtype"]]
    if "vectors" not in entry:
        ground = None
        if (
            name in old.files
            and list(old.shape(name)) == entry["shape"]
            and entry["dtype"] in FLOATS
        ):
            ground = old.read(name).to(dtype)
        return _unpacked_bytes(file.get_tensor(f"{name}|exact"), ground, entry)
    rows, columns = entry["shape"]
    wide = rows < columns
    tall, short = max(rows, columns), min(rows, columns)
    change = torch.zeros(tall, short)
    for index, (count, width) in enumerate(entry["vectors"]):
        parts = []
        for side, length in (("left", tall), ("right", short)):
            codes = _unbits(file.get_tensor(f"{name}|{side}{index}"), width, length, count)
            parts.append(_numbers(codes, file.get_tensor(f"{name}|{side}_steps{index}"), width))
        change += parts[0] @ parts[1].T
    return (old.read(name).float() + (change.T if wide else change)).to(dtype)


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
