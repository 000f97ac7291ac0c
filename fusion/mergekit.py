"""Merges by mergekit, where it is installed: a method of it, or a configuration file of its own.

mergekit runs as a program in a process of its own, so that neither its pins nor its settings reach
this one. What comes out is held to what `checkpoints.merge` gives: a whole folder that loads, with
tokenizer, recipe and card. Its arithmetic is its own: its order of summation, its random masks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import yaml

from fusion.cards import describe
from fusion.compatibility import differences, refuse_mismatches
from fusion.errors import RecipeError, RunError

PREFIX = "mergekit:"
VARIABLE = "KFUSE_MERGEKIT"
_MODELS = ("model", "base_model")  # keys of a configuration whose values are models
_TOKENIZERS = ("source", "tokenizer_source")  # keys whose values may be models
_OTHER_SHAPES = ("slices", "modules", "tokenizer", "tokenizer_source")


def references(configuration: Mapping[str, Any]) -> list[str]:
    """The models that a configuration names, each once, the base last."""
    found = [value for key, value in _strings(configuration) if key == "model"]
    base = configuration.get("base_model")
    return [m for m in dict.fromkeys(found) if m != base] + ([base] if base else [])


def reshapes(given: Mapping[str, Any] | None) -> bool:
    """Whether a configuration may give a model of another depth or tokenizer than its models'."""
    return any(key in (given or ()) for key in _OTHER_SHAPES)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
    elif isinstance(value, str):
        yield key, value


def configuration(
    method: str, parameters: Mapping[str, Any], inputs: Sequence[str], base: str | None, dtype: str
) -> dict[str, Any]:
    """mergekit's configuration for one of its methods.

    `parameters` are its own, for the whole merge; `models`, a list of one mapping an input, has
    those of each model, such as its weight; `seed` is no part of the configuration. Raises
    RecipeError for a list of another length.
    """
    rest = {key: value for key, value in parameters.items() if key not in ("models", "seed")}
    own = parameters.get("models") or [{}] * len(inputs)
    if not isinstance(own, list) or not all(isinstance(one, Mapping) for one in own):
        raise RecipeError(f"{method}: models should be a list of mappings, one an input")
    if len(own) != len(inputs):
        raise RecipeError(f"{method}: {len(own)} models' parameters for {len(inputs)} inputs")
    models = [{"model": m, "parameters": dict(p)} for m, p in zip(inputs, own, strict=True)]
    out: dict[str, Any] = {"merge_method": method.removeprefix(PREFIX), "models": models}
    out |= {"base_model": base} if base else {}
    return out | ({"parameters": rest} if rest else {}) | {"dtype": dtype}


def program() -> Path | None:
    """mergekit-yaml: what KFUSE_MERGEKIT names, else of this environment, else on PATH."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    here = Path(sys.executable).with_name("mergekit-yaml")
    found = str(here) if here.exists() else shutil.which("mergekit-yaml")
    return Path(found) if found else None


def version() -> str:
    """Which mergekit would run, for identities: its version, or its program's hash; or absent."""
    path = program()
    if path is None or not path.is_file():
        return "absent"
    content = path.read_bytes()
    first = content.split(b"\n", 1)[0].decode(errors="replace")
    if first.startswith("#!") and "python" in first:
        ask = "import importlib.metadata as m; print(m.version('mergekit'))"
        with suppress(OSError):  # an interpreter that is gone; its run will say so
            done = subprocess.run([*first[2:].split(), "-c", ask], capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout.strip()
    return f"program-{sha256(content).hexdigest()[:8]}"


def made_by(method: str) -> dict[str, str]:
    """What the identity of a merge by this method has beside its section."""
    return {"mergekit_version": version()} if method.startswith(PREFIX) else {}


def merge(
    given: Mapping[str, Any],
    folders: Mapping[str, Path],
    out: Path,
    section: Mapping[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """Merge model folders as a mergekit configuration says; facts as of `checkpoints.merge`.

    `folders`: of the models by the names that the configuration has. `section`: what the folder's
    `merge.yaml` will say. Models must fit together tensor by tensor unless the configuration takes
    layers apart or has a tokenizer section. RunError if mergekit is not there, ends badly (with
    the end of what it said), or leaves a folder that is not whole.
    """
    from fusion.checkpoints import complete, published

    path = program()
    if path is None or not path.is_file():
        where = f"{VARIABLE} is {path}, which is no file" if path else "it is not installed"
        raise RunError(
            f"mergekit is needed for {section['method']}, but {where}: install kfuse[mergekit], or "
            f"set {VARIABLE} to a mergekit-yaml of another environment"
        )
    base = str(given.get("base_model"))
    origin = folders[base] if base in folders else next(iter(folders.values()))
    notes = _fitting(given, folders, origin)
    with published(out) as partial:
        written = partial / "mergekit.yaml"
        written.write_text(yaml.safe_dump(_with_folders(given, folders), sort_keys=False))
        _run(path, written, partial, seed, own="tokenizer" in given or "tokenizer_source" in given)
        facts = _checked(partial, path)
        # With the rows' names, the file can be read by others and run again.
        written.write_text(yaml.safe_dump(dict(given), sort_keys=False, allow_unicode=True))
        complete(partial, origin)
        describe(partial, section, notes)
    return facts | {"notes": notes, "mergekit": version()}


def _fitting(given: Mapping[str, Any], folders: Mapping[str, Path], origin: Path) -> list[str]:
    """What differs between the models without hindering; refuses what does."""
    from fusion.checkpoints import Checkpoint, read_config

    ordered = dict(sorted(folders.items(), key=lambda pair: pair[1] != origin))
    with ExitStack() as stack:
        named = {name: Checkpoint(folder, stack) for name, folder in ordered.items()}
        if not reshapes(given):
            refuse_mismatches(named, read_config(origin))
        return differences(named)


def _with_folders(value: Any, folders: Mapping[str, Path], key: str = "") -> Any:
    """A configuration with folders in place of the models' names."""
    if isinstance(value, Mapping):
        return {name: _with_folders(inner, folders, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_folders(inner, folders, key) for inner in value]
    if key in _MODELS + _TOKENIZERS and isinstance(value, str) and value in folders:
        return str(folders[value].resolve())
    return value


def _run(path: Path, written: Path, out: Path, seed: int, own: bool) -> None:
    command = [str(path), str(written), str(out), "--random-seed", str(seed)]
    command += ["--no-write-model-card", "--copy-tokenizer" if own else "--no-copy-tokenizer"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
    except OSError as error:
        raise RunError(f"{path}: cannot be run ({error}); check {VARIABLE}") from error
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-15:])
        raise RunError(f"mergekit ended with {done.returncode}; it said:\n{end}")


def _checked(folder: Path, path: Path) -> dict[str, Any]:
    """Facts about a folder that mergekit left; RunError if it would not load."""
    from fusion.checkpoints import Checkpoint

    if not (folder / "config.json").exists():
        raise RunError(f"{path}: left no config.json; is it mergekit-yaml?")
    with ExitStack() as stack:
        held = Checkpoint(folder, stack)
        shapes = {name: held.stored(name) for name in held.files}
        sizes = [held.read(name).nbytes for name in held.files]
    wanted = _expected(folder)
    lost = sorted(wanted.keys() - shapes.keys())
    wrong = sorted(name for name in wanted.keys() & shapes.keys() if wanted[name] != shapes[name])
    if lost or wrong:
        what = f"lacks {lost[0]}" if lost else f"has {wrong[0]} of shape {shapes[wrong[0]]}"
        raise RunError(
            f"mergekit's result does not load: it {what}, against its own config.json, and "
            f"{len(lost) + len(wrong) - 1} more; check the configuration's layers"
        )
    return {
        "tensors": len(shapes),
        "parameters": sum(prod(shape) for shape in shapes.values()),
        "bytes": sum(sizes),
        "files": len(list(folder.glob("*.safetensors"))),
    }


def _expected(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a configuration asks for, tied heads left out."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {n: tuple(p.shape) for n, p in model.named_parameters() if n not in tied}
