"""A recipe's own held-out text as the tasks of `bits_per_byte`, one for each of its domains.

A document's domain is what its JSONL line says, else the folder it lies in, else its file's name.
The text is laid out as the suite's own data is (a JSONL file and a task file a domain), so that it
takes the same way through lm-eval.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import yaml

from fusion.corpus import plain, read_documents
from fusion.errors import RunError
from harness.hashing import corpus_hash
from harness.store import write_text
from tasks.suite import DEFINITIONS, Suite, Task, load_suite

_PREFIX = "kfuse_heldout_"


def heldout_suite(path: str, home: Path) -> tuple[Suite, Path]:
    """The suite and the folder of its data; RunError if the text cannot be read or is empty."""
    key = corpus_hash(home, path, "heldout")
    folder = home / "data" / f"heldout-{key[:8]}"
    domains: dict[str, list[str]] = {}
    for domain, content in read_documents(Path(path).expanduser(), heldout=True):
        text = plain(content)
        if text.strip():
            domains.setdefault(domain, []).append(text)
    if not domains:
        raise RunError(f"corpus.heldout: {path} holds no text")
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    names = _names(sorted(domains))
    for domain, name in names.items():
        lines = [
            json.dumps({"id": f"{name}:{i}", "text": t}) for i, t in enumerate(domains[domain])
        ]
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
        task = {
            "include": str(DEFINITIONS / "_bits.yaml"),
            "task": f"{_PREFIX}{name}",
            "dataset_kwargs": {"dataset": name},
        }
        write_text(folder / f"{name}.yaml", yaml.safe_dump(task))
        tasks.append(Task(f"{_PREFIX}{name}", "bits_per_byte", False, None, domain))
    return replace(load_suite("bits_per_byte"), tasks=tuple(tasks), datasets=()), folder


def _names(domains: list[str]) -> dict[str, str]:
    """A name for tasks and files for each domain; two domains never share one."""
    out: dict[str, str] = {}
    for domain in domains:
        plain = name = re.sub(r"\W+", "_", domain) or "_"
        number = 1
        while name in out.values():
            number += 1
            name = f"{plain}_{number}"
        out[domain] = name
    return out
