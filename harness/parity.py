"""`python -m harness.parity`: whether our scores and texts are those of lm-eval's hf backend.

Both are asked the same requests of the same weights in float32. A log-likelihood may be 1e-3 nats
away; where another choice wins, the two have to be a tie within that; greedy texts are the same
characters. The first tasks are those of `commonsense`, the last is BBH-81 with its own stop rule.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusion.errors import RunError
from harness.evaluate import Item, sample
from harness.measuring import load_suite_data
from harness.peers import SIDES, built, opened
from harness.progress import bar, say
from harness.scoring import Instance
from harness.store import home

ROWS = ("smollm2", "gemma3")
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "boolq", "winogrande")
ITEMS = 40  # questions of a task, drawn with the quickstart's seed
TOKENS = 24  # of a text; --all lets it go on as far as the suite does
SEED = 17
TOLERANCE = 1e-3  # nats
TOGETHER = 64  # questions


def parity(
    rows: Sequence[str] = ROWS,
    tasks: Sequence[str] = (*TASKS, "bbh81"),
    items: int | None = ITEMS,
    tokens: int | None = TOKENS,
) -> None:
    """Print a line for each model and task; RunError names where they are not alike.

    items: questions a task, None for all. tokens: of a generated text at most, None for as many as
    the suite allows.
    """
    unlike = []
    for row in rows:
        folder = built(row)
        ours, theirs = (opened(folder, side) for side in SIDES)
        for task in tasks:
            chosen, total = _items(task, items)
            label = f"{row:<10}{task:<15}{len(chosen):>6} of {total:<6}"
            if task == "bbh81":
                found, right = _texts(ours, theirs, chosen, tokens)
            else:
                found, right = _choices(ours, theirs, chosen)
            say(f"{label} {found}")
            unlike += [] if right else [f"{row}, {task}: {found}"]
        del ours, theirs
        gc.collect()
    if unlike:
        raise RunError("not as lm-eval's hf: " + "; ".join(unlike))


def _items(task: str, count: int | None) -> tuple[list[Item], int]:
    """Questions of a task, a seeded sample of them or all, and how many there are."""
    suite = task if task == "bbh81" else "commonsense"
    loaded = load_suite_data(suite, home(), None, SEED, None, None)
    found = [i for i in loaded.items if task == "bbh81" or i.task == f"kfuse_{task}"]
    kept = sample({task: len(found)}, count, SEED)[task]
    return [found[index] for index in kept], len(found)


def _choices(ours: Any, theirs: Any, items: Sequence[Item]) -> tuple[str, bool]:
    """How far apart log-likelihoods are, and how often another choice wins that is no tie."""
    far, count, greedy, flips = 0.0, 0, 0, 0
    with bar("both answer", len(items)) as progress:
        for start in range(0, len(items), TOGETHER):
            some = items[start : start + TOGETHER]
            requests = [request for item in some for request in item.requests]
            mine, other = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, theirs))
            pairs = iter(zip(mine, other, strict=True))
            for item in some:
                answers = [next(pairs) for _ in item.requests]
                a, b = (np.array([answer[side][0] for answer in answers]) for side in (0, 1))
                far = max(far, float(np.abs(a - b).max()))
                count += len(answers)
                greedy += sum(x[1] != y[1] for x, y in answers)
                lengths = np.array([len(str(r.args[1])) for r in item.requests], dtype=float)
                flips += any(flipped(a / by, b / by, by) for by in (np.ones(len(a)), lengths))
            progress(start + len(some))
    said = (
        f"questions, {count} requests: at most {far:.1e} nats apart (at most {TOLERANCE:g}), "
        f"{flips} flips that are no ties, {greedy} unlike marks of greedy"
    )
    return said, far <= TOLERANCE and not flips


def flipped(mine: np.ndarray, other: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether another choice wins though the other side has the two further apart than a tie.

    The values are log-likelihoods over lengths, each at most TOLERANCE over its length away.
    """
    a, b = int(mine.argmax()), int(other.argmax())
    slack = TOLERANCE / lengths[a] + TOLERANCE / lengths[b]
    return bool(other[b] - other[a] > slack)


def _texts(ours: Any, theirs: Any, items: Sequence[Item], tokens: int | None) -> tuple[str, bool]:
    """How many greedy texts are the same characters."""
    same, longest = 0, 0
    with bar("both generate", len(items)) as progress:
        for start in range(0, len(items), TOGETHER // 4):
            some = items[start : start + TOGETHER // 4]
            requests = [_cut(item.requests[0], tokens) for item in some]
            mine, other = (lm.generate_until(requests, disable_tqdm=True) for lm in (ours, theirs))
            same += sum(a == b for a, b in zip(mine, other, strict=True))
            longest = max([longest, *map(len, other)])
            progress(start + len(some))
    said = f"prompts: {same} texts equal, the longest of {longest} characters"
    return said, same == len(items)


def _cut(request: Instance, tokens: int | None) -> Instance:
    context, how = request.args
    how = dict(how) | ({"max_gen_toks": tokens} if tokens else {})
    return Instance(request.request_type, request.doc, (context, how), request.idx)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m harness.parity", description=parity.__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, "bbh81"), default=(*TASKS, "bbh81"))
    parser.add_argument("--items", type=int, default=ITEMS, help="questions of a task")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a generated text")
    parser.add_argument("--all", action="store_true", help="every question, whole texts")
    given = parser.parse_args()
    limits = (None, None) if given.all else (given.items, given.tokens)
    parity(given.rows, given.tasks, *limits)


if __name__ == "__main__":
    main()
