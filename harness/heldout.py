"""A recipe's own held-out text as the tasks of `bits_per_byte`, one for each of its domains.

A document's domain is what its JSONL line says, else the folder it lies in, else its file's name.
The text is laid out as the suite's own data is (a JSONL file and a task file a domain), so that it
takes the same way through lm-eval.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fusion.corpus import Content, plain, read_documents
from fusion.errors import RunError
from harness.hashing import corpus_hash
from harness.store import write_text
from tasks.suite import DEFINITIONS, Suite, Task, load_suite

_PREFIX = "kfuse_heldout_"


def heldout_suite(path: str, home: Path, name: str = "bits_per_byte") -> tuple[Suite, Path]:
    """The suite and the folder of its data; RunError if the text cannot be read or is empty.

    name: bits_per_byte, or response_bits_per_byte for what is answered in its conversations.
    """
    answered = name == "response_bits_per_byte"
    key = corpus_hash(home, path, "heldout")
    folder = home / "data" / f"{'responses' if answered else 'heldout'}-{key[:8]}"
    domains: dict[str, list[dict[str, Any]]] = {}
    for domain, content in read_documents(Path(path).expanduser(), heldout=True):
        number = len(domains.get(domain, []))
        found = list(_responses(content, number) if answered else _text(content))
        if found:
            domains.setdefault(domain, []).extend(found)
    if not domains:
        what = "answer in a conversation" if answered else "text"
        raise RunError(f"corpus.heldout: {path} holds no {what}")
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    names = _names(sorted(domains))
    for domain, called in names.items():
        lines = [
            json.dumps({"id": f"{called}:{i}", **row}) for i, row in enumerate(domains[domain])
        ]
        write_text(folder / f"{called}.jsonl", "\n".join(lines) + "\n")
        task = {
            "include": str(DEFINITIONS / ("_responses.yaml" if answered else "_bits.yaml")),
            "task": f"{_PREFIX}{called}",
            "dataset_kwargs": {"dataset": called},
        }
        write_text(folder / f"{called}.yaml", yaml.safe_dump(task))
        tasks.append(Task(f"{_PREFIX}{called}", "bits_per_byte", False, None, domain))
    return replace(load_suite(name), tasks=tuple(tasks), datasets=()), folder


def _text(content: Content) -> Iterator[dict[str, Any]]:
    text = plain(content)
    if text.strip():
        yield {"text": text}


def _responses(content: Content, number: int) -> Iterator[dict[str, Any]]:
    """Each answer with all that is said before it; a conversation is one cluster."""
    for at, (role, said) in enumerate(() if isinstance(content, str) else content):
        if role == "assistant" and said and at:
            before = [list(message) for message in content[:at]]
            prompt = str(content[at - 1][1])
            yield {"prompt": prompt, "messages": before, "answer": said, "cluster": str(number)}


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
