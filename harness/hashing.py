"""Content hashes: files, model folders, corpora, and what defines a suite."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path

from fusion.errors import RunError
from harness.assets import PINNED
from harness.store import identity, read_manifest, write_json
from tasks.suite import load_suite

TINY_VERSION = 3  # raise when the tiny models or their corpus come out otherwise
_MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".txt", ".jinja")


def file_hash(home: Path, path: Path) -> str:
    """sha256 of a file, remembered by path, size and time of change."""
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    remembered = home / "hashes.json"
    try:
        known = json.loads(remembered.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        with path.open("rb") as data:
            known[key] = hashlib.file_digest(data, "sha256").hexdigest()
        home.mkdir(parents=True, exist_ok=True)
        write_json(remembered, known)
    return known[key]


def folder_hash(home: Path, folder: Path) -> str:
    """Content hash of a model folder: weights, configuration, tokenizer."""
    files = sorted(
        p for p in folder.iterdir() if p.suffix in _MODEL_FILES and p.name != "manifest.json"
    )
    return identity({p.name: file_hash(home, p) for p in files})


def corpus_hash(home: Path, path: str, key: str = "path") -> str:
    """Content hash of a corpus: its files, or what pins it. key: where the recipe names it."""
    if key == "path" and path.startswith(("pypi:", "tiny:", "hub:")):
        return identity({"path": path, "sha256": PINNED.get(path[5:]), "v": TINY_VERSION})
    place = Path(path).expanduser()
    if not place.exists():
        raise RunError(f"corpus.{key}: {path} does not exist ({place.absolute()})")
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return identity({str(p.relative_to(place)): file_hash(home, p) for p in files})


def data_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each set of questions in a folder of `prepare_data`; empty for any other folder."""
    sets = (read_manifest(folder) or {}).get("sets", {})
    return {name: entry["sha256"] for name, entry in sorted(sets.items())}


@cache
def definition_hash(suite: str) -> str:
    """Hash of what defines a suite: what it says, its task files and what they include, lm-eval."""
    from importlib.metadata import version

    if suite.startswith("lm_eval:"):
        return identity({"lm_eval": version("lm-eval"), "task": suite})
    import tasks

    root = Path(tasks.__file__).parent
    folder = root / "definitions"
    texts = {path: path.read_text() for path in sorted(folder.rglob("*.yaml"))}
    wanted = {f"task: {task.name}" for task in load_suite(suite).tasks}
    used = {path for path, text in texts.items() if wanted & set(text.splitlines())}
    known = load_suite(suite)
    if known.stock:  # lm-eval's task file includes ours, from beside the questions
        used.add(folder / "_stock.yaml")
    waiting = sorted(used)
    while waiting:
        path = waiting.pop()
        included = re.findall(r"^include: (\S+)$", texts[path], re.MULTILINE)
        found = {(path.parent / include).resolve() for include in included}
        waiting += sorted(found - used)
        used |= found
    content = {path.name: texts[path] for path in sorted(used)}
    content["suite"] = repr(known)
    if known.chat or known.stock:
        content["asked"] = repr([known.chat, known.stock, known.splits])
    modules = {m for path in used for m in re.findall(r"!function (\w+)\.", texts[path])}
    while modules - set(content):
        module = min(modules - set(content))
        content[module] = (folder / f"{module}.py").read_text()
        modules |= set(re.findall(r"^from tasks\.definitions\.(\w+) ", content[module], re.M))
    return identity({"files": content, "lm_eval": version("lm-eval")})
