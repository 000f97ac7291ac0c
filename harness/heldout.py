"""A recipe's own held-out text as the tasks of `bits_per_byte`, one for each of its domains.

The text is laid out as the suite's own data is (a JSONL file and a task file a domain), so that it
takes the same way through lm-eval.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import yaml

from fusion.corpus import read_documents
from fusion.errors import RunError
from harness.hashing import corpus_hash
from harness.store import write_text
from tasks.suite import DEFINITIONS, Suite, Task, load_suite


def heldout_suite(path: str, home: Path) -> tuple[Suite, Path]:
    """The suite and the folder of its data; RunError if the text cannot be read or is empty."""
    content = corpus_hash(home, path, "heldout")
    folder = home / "data" / f"heldout-{content[:8]}"
    domains: dict[str, list[str]] = {}
    for domain, text in read_documents(Path(path).expanduser()):
        if text.strip():
            domains.setdefault(re.sub(r"\W+", "_", domain), []).append(text)
    if not domains:
        raise RunError(f"corpus.heldout: {path} holds no text")
    folder.mkdir(parents=True, exist_ok=True)
    for domain, texts in domains.items():
        lines = [json.dumps({"id": f"{domain}:{i}", "text": t}) for i, t in enumerate(texts)]
        write_text(folder / f"{domain}.jsonl", "\n".join(lines) + "\n")
        task = {
            "include": str(DEFINITIONS / "_bits.yaml"),
            "task": f"kfuse_heldout_{domain}",
            "dataset_kwargs": {"dataset": domain},
        }
        write_text(folder / f"{domain}.yaml", yaml.safe_dump(task))
    tasks = [Task(f"kfuse_heldout_{d}", "bits_per_byte", False, None, d) for d in sorted(domains)]
    return replace(load_suite("bits_per_byte"), tasks=tuple(tasks), datasets=()), folder
