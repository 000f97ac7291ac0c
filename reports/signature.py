"""The one line that identifies a number: two numbers may be compared when only the model differs.

The order of the fields is fixed, so that signatures can be compared as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

# What has to be equal before two runs of a suite are compared; tasks are compared one by one.
COMPARED = ("suite", "rule", "protocol", "seed", "limit", "dtype", "lm_eval")
COMPARED_TASK = ("metric", "higher_is_better", "shots", "n_total", "protocol")


def engine(manifest: Mapping[str, Any]) -> str:
    """What scored a run: kfuse, or the backend of lm-eval's that did."""
    name = (manifest.get("engine") or {}).get("name") or "kfuse"
    return "+".join(name) if isinstance(name, list) else str(name)


def sandbox(manifest: Mapping[str, Any]) -> str | None:
    """Where a run's programs were executed: tier, and a hash of image and versions by language.

    None for a run that executed none, or that was finished before runs said where.
    """
    found = manifest.get("sandbox")
    if not found:
        return None
    within = [found.get("image_id"), sorted((found.get("toolchains") or {}).items())]
    return f"{found.get('tier')}@{sha256(json.dumps(within).encode()).hexdigest()[:8]}"


def signature(manifest: Mapping[str, Any], n: int, n_total: int, task: str | None = None) -> str:
    """The signature of a suite's score, or of one task of it; n and n_total count items.

    ValueError if the manifest has no such task.
    """
    parts = {"suite": f"{manifest['suite']}@{manifest['protocol']}"}
    if task is None:
        parts["rule"] = manifest.get("rule", "macro")
        parts["tasks"] = str(len(manifest["tasks"]))
        parts["metric"] = "+".join(dict.fromkeys(t["metric"] for t in manifest["tasks"]))
        shots = sorted({t.get("shots", 0) for t in manifest["tasks"]})
        parts["shots"] = "+".join(map(str, shots))
    else:
        found = next((t for t in manifest["tasks"] if t["task"] == task), None)
        if found is None:
            known = ", ".join(t["task"] for t in manifest["tasks"])
            raise ValueError(f"{manifest['suite']}: no task {task!r} in its manifest; has {known}")
        parts["task"] = f"{task}@{found.get('protocol', '?')}"
        parts["metric"] = found["metric"]
        parts["shots"] = str(found.get("shots", 0))
    parts["n"] = f"{n}/{n_total}"
    parts["seed"] = str(manifest.get("seed"))
    parts["dtype"] = str(manifest.get("dtype"))
    parts["engine"] = _engine(manifest.get("engine") or {})
    parts["lm_eval"] = str(manifest.get("lm_eval"))
    if within := sandbox(manifest):
        parts["sandbox"] = within
    if manifest.get("mixing"):
        parts["mixing"] = str(manifest["mixing"])
    parts["model"] = f"{manifest['row']}@{str(manifest['model_identity'])[:8]}"
    return "|".join(f"{key}:{value}" for key, value in parts.items())


def _engine(engine: Mapping[str, Any]) -> str:
    """What measured: the model class, how it scores, generates and attends, and on what."""
    said = []
    for key, value in engine.items():
        text = "/".join(map(str, value)) if isinstance(value, list) else str(value)
        if key != "dtype":
            said.append(f"{key} {text}" if text[:1].isdigit() else text)
    return ",".join(said) or "unknown"


def differences(manifest: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """Which fields forbid to compare two runs, each with both values; empty if none does."""
    found = []
    for key in COMPARED:
        here, there = manifest.get(key), reference.get(key)
        if here != there:
            found.append(f"{key} is {here}, in the reference {there}")
    if engine(manifest) != engine(reference):
        found.append(f"engine is {engine(manifest)}, in the reference {engine(reference)}")
    if sandbox(manifest) != sandbox(reference):
        found.append(f"sandbox is {sandbox(manifest)}, in the reference {sandbox(reference)}")
    tasks = {task["task"]: task for task in manifest["tasks"]}
    others = {task["task"]: task for task in reference["tasks"]}
    for name in dict.fromkeys([*tasks, *others]):
        if name not in tasks or name not in others:
            where = "the reference" if name in others else "this row"
            found.append(f"task {name} is only in {where}")
            continue
        for key in COMPARED_TASK:
            here, there = tasks[name].get(key), others[name].get(key)
            if here != there:
                found.append(f"{name}.{key} is {here}, in the reference {there}")
    return found
