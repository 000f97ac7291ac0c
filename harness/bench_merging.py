"""What merging five checkpoints costs beside copying the same bytes, and beside mergekit.

The checkpoints have the shapes of SmolLM2-135M (538 MB each in float32) and random weights; all
lie in TMPDIR. Copying reads the bytes of all that a merge reads and writes those of one. Both are
timed twice: on the disk, with nothing of the files in memory before and the output on the disk
after, as models of billions of parameters are merged; and in memory, where files are read that lie
there and the system writes when it likes. Each method merges in a process of its own: small models,
so that its loops are compiled (a second or two, once for a number of models), then on the disk, in
memory, and with three threads for its peak. That is of what it allocated (RssAnon, as the system
counts it, above that before the merge): pages of mapped files, which the system takes back at need,
do not count. mergekit runs on the same files, in memory, where KFUSE_MERGEKIT names its
`mergekit-yaml`; its imports are timed apart and left out. CPU seconds stand beside the seconds, as
they say more on a machine that is not idle. Methods that take statistics of a corpus are left out:
random weights have none that mean anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4}
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
# Folders, small folders, the base's number or -1, where to, method, options.
_OURS = """
import hashlib, json, os, sys, threading, time, torch
from pathlib import Path
from fusion.checkpoints import merge
from harness.bench_merging import forget
folders, small, base, out, method, options = json.loads(sys.argv[1])
def held():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
torch.ones(4) @ torch.ones(4)
seen = []
written = Path(out) / "model.safetensors"
def once(folders, sync=False):
    folders = [Path(f) for f in folders]
    started, used = time.perf_counter(), sum(os.times()[:2])
    onto = folders.pop(base) if base >= 0 else None
    names = [folder.name for folder in folders]
    merge(folders, onto, Path(out), method, options, models=names)
    if sync:
        with written.open("rb") as data:
            os.fsync(data.fileno())
    taken = time.perf_counter() - started, sum(os.times()[:2]) - used
    with written.open("rb") as data:
        seen.append(hashlib.file_digest(data, "sha256").hexdigest())
    written.unlink()
    os.sync()
    return taken
once(small)
seen.clear()
forget(folders)
cold = once(folders, True)
once(folders)
warm = once(folders)
# Once more with other threads and watched, which takes time of its own.
before, peak, done = held(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], held())
torch.set_num_threads(3)
watching = threading.Thread(target=watch)
watching.start()
once(folders)
done.set()
watching.join()
print(json.dumps([*cold, *warm, peak[0] - before, len(set(seen))]))
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
    count = 2 if method == "slerp" else COUNT
    folders, small = ([root / f"{kind}{n}" for n in range(count)] for kind in ("m", "small"))
    base = folders[0] if needs_base(method) else None
    copied = _copied(folders, root)
    job: list[Any] = [list(map(str, folders)), list(map(str, small)), -1 if base is None else 0]
    job += [str(root / "ours"), method, OPTIONS.get(method, {})]
    cold, _, seconds, used, peak, kinds = json.loads(
        _output([sys.executable, "-c", _OURS, json.dumps(job)])
    )
    copied = [min(pair) for pair in zip(copied, _copied(folders, root), strict=True)]
    same = "same bytes" if kinds == 1 else "BYTES DIFFER"
    line = (
        f"  {method:<16}{cold:6.2f} s on the disk, {copied[0] / cold:4.0%} of copying; "
        f"{seconds:5.2f} s in memory, {copied[1] / seconds:4.0%}; {used:5.2f} CPU s, "
        f"{copied[2] / used:4.0%}; {peak / largest:5.2f} largest tensors; {same} with "
        f"{torch.get_num_threads()} and 3 threads"
    )
    inputs = [str(folder) for folder in folders if folder != base]
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
    """Write the checkpoints, small changes of one, and small ones; bytes of the largest tensor."""
    from transformers import LlamaConfig, LlamaForCausalLM

    largest = 0
    for kind, shape in (("small", SHAPE | SMALL), ("m", SHAPE)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape, architectures=["LlamaForCausalLM"]))
        weights = {name: p.detach() for name, p in model.named_parameters()}
        g = torch.Generator().manual_seed(1)
        for number in range(COUNT):
            folder = root / f"{kind}{number}"
            model.config.save_pretrained(folder)
            changed = {
                name: tensor + 1e-3 * (number > 0) * torch.randn(tensor.shape, generator=g)
                for name, tensor in weights.items()
            }
            save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        largest = max(tensor.nbytes for tensor in weights.values())
    os.sync()
    return largest


def forget(folders: Sequence[Path | str]) -> None:
    """Have the system drop what it holds in memory of the models' files."""
    os.sync()
    for folder in folders:
        with (Path(folder) / "model.safetensors").open("rb") as data:
            os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copied(folders: list[Path], root: Path) -> list[float]:
    """Seconds to read all models and write one, on the disk and in memory, and its CPU seconds.

    The best of two times.
    """
    found = []
    for _ in range(2):
        forget(folders)
        cold, _ = _copy(folders, root, sync=True)
        found.append((cold, *_copy(folders, root)))
    return [min(column) for column in zip(*found, strict=True)]


def _copy(folders: list[Path], root: Path, sync: bool = False) -> tuple[float, float]:
    """Seconds and CPU seconds of it; with `sync`, what is written is on the disk."""
    started, used = time.perf_counter(), sum(os.times()[:2])
    with (root / "copy").open("wb") as out:
        for folder in folders:
            with (folder / "model.safetensors").open("rb") as data:
                while block := data.read(1 << 22):
                    if folder is folders[0]:
                        out.write(block)
        out.flush()
        if sync:
            os.fsync(out.fileno())
    seconds = time.perf_counter() - started, sum(os.times()[:2]) - used
    (root / "copy").unlink()
    os.sync()
    return seconds


def _watched(command: list[str]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak anonymous bytes of a command."""
    seconds, used, peak = map(float, _output([sys.executable, "-c", _WATCH, *command]).split())
    return seconds, used, peak


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout
