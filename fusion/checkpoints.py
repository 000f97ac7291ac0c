"""Stream several checkpoints through a merge method into one model folder.

Tensor by tensor from memory-mapped safetensors, arithmetic in float32. Compatibility is checked
before any work, all mismatches in one message. The result is an ordinary model folder with the
configuration and tokenizer of the base, or of the first input.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusion.errors import RecipeError, RunError
from fusion.merging import MERGE_METHODS
from fusion.models import DTYPES

SHARD_BYTES = 2_000_000_000  # what one written file holds at most; also what is in memory at once
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_COPIED = ("manifest.json", "job.json", "model.safetensors.index.json")


class Checkpoint:
    """The tensors of one model folder, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise RunError(f"{folder}: holds no .safetensors file")
        for shard in shards:
            with _reading(shard):
                opened = stack.enter_context(safe_open(shard, framework="pt"))
                self.files |= dict.fromkeys(opened.keys(), opened)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        return self.files[name].get_tensor(name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{path}: not a whole safetensors file ({error}); fetch or build it again"
        ) from error


def mismatches(named: Mapping[str, Checkpoint]) -> list[str]:
    """Why these checkpoints cannot be merged: one sentence a tensor that differs."""
    first_name, first = next(iter(named.items()))
    out = []
    for name, other in list(named.items())[1:]:
        for tensor in sorted(first.files.keys() - other.files.keys()):
            out.append(f"{tensor} is in {first_name} but not in {name}")
        for tensor in sorted(other.files.keys() - first.files.keys()):
            out.append(f"{tensor} is in {name} but not in {first_name}")
        for tensor in sorted(first.files.keys() & other.files.keys()):
            one, two = first.shape(tensor), other.shape(tensor)
            if one != two:
                out.append(f"{tensor} is {one} in {first_name} but {two} in {name}")
    return out


def merge(
    folders: Sequence[Path],
    base: Path | None,
    out: Path,
    method: str,
    parameters: Mapping[str, Any],
    dtype: str = "float32",
) -> dict[str, Any]:
    """Merge model folders into `out`; facts: tensors and parameters merged.

    RunError if the models do not fit together or a file is damaged; RecipeError if the method
    refuses its parameters.
    """
    function = MERGE_METHODS[method]
    with ExitStack() as stack:
        inputs = [Checkpoint(folder, stack) for folder in folders]
        ground = Checkpoint(base, stack) if base else None
        named = {c.folder.name: c for c in [*([ground] if ground else []), *inputs]}
        wrong = mismatches(named)
        if wrong:
            more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise RunError(
                "these models cannot be merged tensor by tensor:\n  "
                + "\n  ".join(wrong[:10])
                + more
                + "\nmerge rows that were trained from one source"
            )
        names = sorted(inputs[0].files)
        shards: list[list[str]] = [[]]
        pending: dict[str, Tensor] = {}
        size = total = 0
        for name in names:
            with _reading(inputs[0].folder / name):
                read = [c.read(name) for c in inputs]
                stored = ground.read(name) if ground else None
            if read[0].is_floating_point():
                floats = [tensor.float() for tensor in read]
                zero = stored.float() if stored is not None else None
                try:
                    merged = function(floats, zero, **parameters).to(DTYPES[dtype])
                except ValueError as error:
                    raise RecipeError(f"merge method {method}: {error}") from error
            else:
                if any(not torch.equal(read[0], other) for other in read[1:]):
                    raise RunError(f"{name} holds whole numbers that differ between the models")
                merged = read[0]
            if pending and size + merged.nbytes > SHARD_BYTES:
                _write(out, pending, len(shards))
                shards.append([])
                pending, size = {}, 0
            pending[name] = merged.contiguous()
            shards[-1].append(name)
            size += merged.nbytes
            total += merged.numel()
        _write(out, pending, len(shards))
    _name_shards(out, shards)
    _copy_rest(base or folders[0], out)
    return {"tensors": len(names), "parameters": total}


def _write(out: Path, tensors: dict[str, Tensor], number: int) -> None:
    save_file(tensors, out / f"shard-{number}.safetensors", metadata={"format": "pt"})


def _name_shards(out: Path, shards: Sequence[Sequence[str]]) -> None:
    """Final file names, and the index that several files need."""
    if len(shards) == 1:
        (out / "shard-1.safetensors").replace(out / "model.safetensors")
        return
    where = {}
    for number, names in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (out / f"shard-{number}.safetensors").replace(out / final)
        where |= dict.fromkeys(names, final)
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _copy_rest(source: Path, out: Path) -> None:
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.name not in _NOT_COPIED:
                shutil.copyfile(path, out / path.name)
