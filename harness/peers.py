"""`python -m harness.bench scoring`: our scoring against lm-eval's own backend, same weights.

Both answer the same requests in one process, in turn, a few times over; how far apart the answers
are is printed, too. Memory is that of a fresh process for each, so that neither holds what the
other asked for.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from fusion.errors import RunError
from harness.assets import prepare_data
from harness.build import build
from harness.model_folder import model_folder
from harness.plan import plan
from harness.progress import say
from harness.recipe import load
from harness.scoring import Instance, SharedPrefixLM, stock
from harness.store import home
from tasks.definitions.data import exemplar_documents

TASKS = ("navigate", "object_counting", "snarks", "sports_understanding", "web_of_lies")
LONG = 120  # seconds; a case is repeated no longer than this, but three times at least
ROUNDS = 5
SIDES = ("kfuse", "hf")
THOUGHT = "\nA: Let's think step by step."


def scoring() -> None:
    """Choices without and with shots, and prompts with shots up to their first new token."""
    folder = built("smollm2")
    _speed(folder)
    if torch.cuda.is_available() or not Path("/proc/self/clear_refs").exists():
        say("peak memory is measured on Linux without a GPU only")
        return
    for label in cases():
        ours, theirs = (peak_memory(folder, side, label) for side in SIDES)
        say(
            f"{label:<32}{ours / 2**20:>7,.0f} MiB at the peak, lm-eval's hf "
            f"{theirs / 2**20:,.0f}: {ours / theirs:.2f} times that (at most 1)"
        )


def _speed(folder: Path) -> None:
    models = [opened(folder, side) for side in SIDES]
    for label, requests in cases().items():
        works = [partial(_answer, lm, requests) for lm in models]
        seconds, processor, (mine, other) = _in_turn(*works)
        ours, theirs = (min(some) for some in zip(*seconds, strict=True))
        middle = median(b / a for a, b in seconds)
        used = median(b / a for a, b in processor)
        say(
            f"{label:<32}{len(requests) / ours:>7.1f} requests/s, {theirs / ours:.1f} times "
            f"lm-eval's hf (medians of {len(seconds)}: {middle:.1f}, by processor time "
            f"{used:.1f}); {_apart(mine, other)}"
        )


def built(row: str) -> Path:
    """The model folder of one of the quickstart's rows, built if need be."""
    planned = plan(load("quickstart").recipe, home())
    failed = build(planned, [row])
    if failed:
        raise RunError("; ".join(failed.values()))
    return model_folder(planned, row)


def cases() -> dict[str, list[Instance]]:
    """Requests by what they are and how many times faster they have to be."""
    data = prepare_data(("hellaswag", "arc_challenge"), home())
    hellaswag, arc = (
        [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("hellaswag", "arc_challenge")
    )
    shots = "".join(f"{q['query']} {q['choices'][q['gold']]}\n\n" for q in arc[:25])
    solved = exemplar_documents("date_understanding")[0]["prompt"].rpartition("\n\nQ:")[0]
    asked = [exemplar["input"] for task in TASKS for exemplar in exemplar_documents(task)]
    until = {"until": ["\n\n"], "max_gen_toks": 1, "do_sample": False}
    prompts = [f"{solved}\n\nQ: {question}{THOUGHT}" for question in asked]
    return {
        "HellaSwag, no shots (floor 2.2)": _choices("", hellaswag[:40]),
        "ARC-c, 25 shots (floor 10)": _choices(shots, arc[25:31]),
        "BBH, shots read (floor 5)": [
            Instance("generate_until", {}, (prompt, until), i) for i, prompt in enumerate(prompts)
        ],
    }


def _choices(before: str, questions: list[dict[str, Any]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (before + question["query"], f" {choice}"), index)
        for index, question in enumerate(questions)
        for choice in question["choices"]
    ]


def peak_memory(folder: Path, side: str, label: str) -> int:
    """Bytes that a fresh process holds at most while one side answers a case."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_peak, str(folder), side, label).result()


def _peak(folder: str, side: str, label: str) -> int:
    requests = cases()[label]
    lm = opened(Path(folder), side)
    _answer(lm, requests[:1])  # what is read or compiled once is no cost of these requests
    gc.collect()
    # The kernel keeps the mark of this process alone; that of `getrusage` is its parent's, too.
    Path("/proc/self/clear_refs").write_text("5")
    _answer(lm, requests)
    status = Path("/proc/self/status").read_text()
    (mark,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return max(int(mark.split()[1]) * 1024, psutil.Process().memory_info().rss)


def opened(folder: Path, side: str) -> Any:
    """One side's model of a folder, both on the same device."""
    place = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        SharedPrefixLM(str(folder), device=place) if side == "kfuse" else stock(str(folder), place)
    )


def _answer(lm: Any, requests: list[Instance]) -> list:
    if requests[0].request_type == "generate_until":
        return lm.generate_until(requests, disable_tqdm=True)
    return lm.loglikelihood(requests, disable_tqdm=True)


Rounds = list[tuple[float, ...]]


def _in_turn(*works: Callable[[], list]) -> tuple[Rounds, Rounds, list[list]]:
    """Seconds of each work, round by round, by the clock and of the processor; what came out.

    On a busy machine the processor's say more.
    """
    seconds: Rounds = []
    processor: Rounds = []
    found: list[list] = []
    began = time.perf_counter()
    while len(seconds) < ROUNDS:
        found, spent, used = [], [], []
        for work in works:
            started, before = time.perf_counter(), time.process_time()
            found.append(work())
            spent.append(time.perf_counter() - started)
            used.append(time.process_time() - before)
        seconds.append(tuple(spent))
        processor.append(tuple(used))
        if len(seconds) >= 3 and time.perf_counter() - began > LONG:
            break
    return seconds, processor, found


def _apart(mine: Sequence[Any], other: Sequence[Any]) -> str:
    pairs = list(zip(mine, other, strict=True))
    if isinstance(mine[0], str):
        return f"{sum(a == b for a, b in pairs)} of {len(pairs)} texts equal"
    far = max(abs(a[0] - b[0]) for a, b in pairs)
    return f"at most {far:.1e} nats apart, {sum(a[1] != b[1] for a, b in pairs)} flips"
