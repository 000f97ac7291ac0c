"""What merging five checkpoints costs beside copying the same bytes, and beside mergekit.

The checkpoints have the shapes of SmolLM2-135M (538 MB each in float32) and random weights; all
lie in TMPDIR. Copying reads the bytes of all that a merge reads and writes those of one; both find
the files in memory, so the disk is no part of it. Each method merges in a process of its own: once
so that its loops are compiled (a second or two, once for a number of models), once for the time,
and once with three threads for its peak. That is of what it allocated (RssAnon, as the system
counts it, above that before the merge): pages of mapped files, which the system takes back at need,
do not count. mergekit runs on the same files where KFUSE_MERGEKIT names its `mergekit-yaml`; its
imports are timed apart and left out. CPU seconds stand beside the seconds, as they say more on a
machine that is not idle. Methods that take statistics of a corpus are left out: random weights have
none that mean anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from fusion.mergekit import program
from fusion.merging import COLLECTED, MERGE_METHODS, needs_base
from harness.progress import say

COUNT = 5
SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weights": [0.25] * (COUNT - 1)},
    "ties@mergekit": {"density": 0.2},
    "sce@mergekit": {"select_topk": 0.1},
}
# ours: mergekit's name, its parameters of each model, and of all
THEIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("linear", {"weight": 1.0}, {}),
    "karcher": ("karcher", {}, {}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.25}, {}),
    "ties@mergekit": ("ties", {"weight": 1.0, "density": 0.2}, {}),
    "dare_linear": ("dare_linear", {"weight": 1.0, "density": 0.1}, {}),
    "sce@mergekit": ("sce", {}, {"select_topk": 0.1}),
    "model_stock": ("model_stock", {}, {}),
}
# Folders, the base's or nothing, where to, method, options: merges three times.
_OURS = """
import hashlib, json, os, sys, threading, time, torch
from pathlib import Path
from fusion.checkpoints import merge
folders, base, out, method, options = json.loads(sys.argv[1])
def held():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
torch.ones(4) @ torch.ones(4)
seen = []
def once():
    merge([Path(f) for f in folders], Path(base) if base else None, Path(out), method, options)
    with (Path(out) / "model.safetensors").open("rb") as data:
        seen.append(hashlib.file_digest(data, "sha256").hexdigest())
once()
started, used = time.perf_counter(), sum(os.times()[:2])
merge([Path(f) for f in folders], Path(base) if base else None, Path(out), method, options)
seconds = time.perf_counter() - started, sum(os.times()[:2]) - used
# Once more with other threads and watched, which takes time of its own.
before, peak, done = held(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], held())
torch.set_num_threads(3)
watching = threading.Thread(target=watch)
watching.start()
once()
done.set()
watching.join()
print(json.dumps([*seconds, peak[0] - before, len(set(seen))]))
"""
# Runs a command; prints its seconds, its CPU seconds and its largest RssAnon in bytes.
_WATCH = """
import os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
most = 0
while child.poll() is None:
    try:
        for line in open(f"/proc/{child.pid}/status"):
            if line.startswith("RssAnon"):
                most = max(most, 1024 * int(line.split()[1]))
    except OSError:
        pass
    time.sleep(0.005)
if child.returncode:
    sys.exit(child.stderr.read().decode()[-2000:])
print(time.perf_counter() - started, sum(os.times()[2:4]), most)
"""


def merging() -> None:
    """Time and memory of each method, beside a copy of the same bytes and beside mergekit."""
    theirs = program()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        largest = _models(root)
        size = (root / "m0" / "model.safetensors").stat().st_size
        say(
            f"merging {COUNT} models of {size / 1e6:,.0f} MB, largest tensor {largest / 1e6:,.0f} "
            f"MB, {torch.get_num_threads()} threads (floors: 60% of copying, {COUNT + 2} largest "
            "tensors of memory)"
        )
        imports = (0.0, 0.0, 0.0)
        for _ in range(2 if theirs else 0):  # the first time reads them from the disk
            imports = _watched([str(theirs), "--help"])
        for method in (name for name in MERGE_METHODS if name not in COLLECTED):
            _method(root, method, largest, str(theirs) if theirs else "", imports)
        if not theirs:
            say("  mergekit is not there: set KFUSE_MERGEKIT to its mergekit-yaml to compare")


def _method(
    root: Path, method: str, largest: int, theirs: str, imports: tuple[float, float, float]
) -> None:
    folders = [root / f"m{number}" for number in range(2 if method == "slerp" else COUNT)]
    base = folders[0] if needs_base(method) else None
    copied = _copied(folders, root)
    inputs = [str(folder) for folder in folders if folder != base]
    job = [inputs, base and str(base), str(root / "ours"), method, OPTIONS.get(method, {})]
    seconds, used, peak, kinds = json.loads(_output([sys.executable, "-c", _OURS, json.dumps(job)]))
    copied = [min(pair) for pair in zip(copied, _copied(folders, root), strict=True)]
    same = "same bytes" if kinds == 1 else "BYTES DIFFER"
    line = (
        f"  {method:<16}{seconds:6.2f} s, {copied[0] / seconds:4.0%} of copying; {used:5.2f} CPU "
        f"s, {copied[1] / used:4.0%}; {peak / largest:5.2f} largest tensors; {same} with "
        f"{torch.get_num_threads()} and 3 threads"
    )
    if theirs and method in THEIRS:
        name, each, every = THEIRS[method]
        config: dict[str, Any] = {"merge_method": name, "dtype": "float32", "parameters": every}
        config["models"] = [{"model": path, "parameters": each} for path in inputs]
        config |= {"base_model": str(base)} if base else {}
        (root / "config.yml").write_text(yaml.safe_dump(config))
        flags = ["--no-copy-tokenizer", "--no-write-model-card"]
        took, spent, held = _watched(
            [theirs, str(root / "config.yml"), str(root / "theirs"), *flags]
        )
        line += (
            f"; mergekit {(took - imports[0]) / seconds:.1f} times the time, "
            f"{(spent - imports[1]) / used:.1f} times the CPU time, "
            f"{(held - imports[2]) / max(1, peak):.1f} times the memory"
        )
    say(line)


def _models(root: Path) -> int:
    """Write the checkpoints, small changes of one; bytes of a model's largest tensor."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    g = torch.Generator().manual_seed(1)
    for number in range(COUNT):
        folder = root / f"m{number}"
        model.config.save_pretrained(folder)
        changed = {
            name: tensor + 1e-3 * (number > 0) * torch.randn(tensor.shape, generator=g)
            for name, tensor in weights.items()
        }
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return max(tensor.nbytes for tensor in weights.values())


def _copied(folders: list[Path], root: Path) -> list[float]:
    """Seconds, and CPU seconds, to read all models and write one; the best of two times."""
    seconds = []
    for _ in range(2):
        started, used = time.perf_counter(), sum(os.times()[:2])
        with (root / "copy").open("wb") as out:
            for folder in folders:
                with (folder / "model.safetensors").open("rb") as data:
                    while block := data.read(1 << 22):
                        if folder is folders[0]:
                            out.write(block)
        seconds.append((time.perf_counter() - started, sum(os.times()[:2]) - used))
        (root / "copy").unlink()
    return [min(column) for column in zip(*seconds, strict=True)]


def _watched(command: list[str]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak anonymous bytes of a command."""
    seconds, used, peak = map(float, _output([sys.executable, "-c", _WATCH, *command]).split())
    return seconds, used, peak


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout
