"""`python -m harness.bench scoring`: our scoring against lm-eval's own backend, same weights.

Both answer the same requests in one process, in turn; how far apart they are is printed, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from fusion.errors import RunError
from harness.assets import prepare_data
from harness.build import build, model_folder
from harness.plan import plan
from harness.progress import say
from harness.recipe import load
from harness.scoring import Instance, SharedPrefixLM, stock
from harness.store import home
from tasks.definitions.data import exemplar_documents

TASKS = ("navigate", "object_counting", "snarks", "sports_understanding", "web_of_lies")
LONG = 10  # seconds
THOUGHT = "\nA: Let's think step by step."


def scoring() -> None:
    """Choices without and with shots, and prompts with shots up to their first new token."""
    planned = plan(load("quickstart").recipe, home())
    failed = build(planned, ["smollm2"])
    if failed:
        raise RunError("; ".join(failed.values()))
    folder = str(model_folder(planned, "smollm2"))
    ours = SharedPrefixLM(folder)
    theirs = stock(folder, str(ours.model.device))
    for label, requests in _cases():
        if requests[0].request_type == "generate_until":
            one, mine = _timed(lambda r=requests: ours.generate_until(r))  # type: ignore[misc]
            two, other = _timed(lambda r=requests: theirs.generate_until(r, True))  # type: ignore[misc]
            same = sum(a == b for a, b in zip(mine, other, strict=True))
            said = f"{same} of {len(mine)} texts equal"
        else:
            one, mine = _timed(lambda r=requests: ours.loglikelihood(r))  # type: ignore[misc]
            two, other = _timed(lambda r=requests: theirs.loglikelihood(r, True))  # type: ignore[misc]
            pairs = list(zip(mine, other, strict=True))
            far = max(abs(a[0] - b[0]) for a, b in pairs)
            said = f"at most {far:.1e} nats apart, {sum(a[1] != b[1] for a, b in pairs)} flips"
        rate = len(requests) / one
        say(f"{label:<32}{rate:>7.1f} requests/s, {two / one:.1f} times lm-eval's hf; {said}")


def _timed(work: Callable[[], list]) -> tuple[float, list]:
    """Seconds of the faster of two, or of one that takes long, and what came out."""
    seconds = float("inf")
    found: list = []
    for _ in range(2):
        started = time.perf_counter()
        found = work()
        seconds = min(seconds, time.perf_counter() - started)
        if seconds > LONG:
            break
    return seconds, found


def _cases() -> Iterator[tuple[str, list[Instance]]]:
    data = prepare_data(("hellaswag", "arc_challenge"), home())
    hellaswag, arc = (
        [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("hellaswag", "arc_challenge")
    )
    shots = "".join(f"{q['query']} {q['choices'][q['gold']]}\n\n" for q in arc[:25])
    yield "HellaSwag, no shots (floor 2.2)", _choices("", hellaswag[:40])
    yield "ARC-c, 25 shots (floor 10)", _choices(shots, arc[25:31])
    solved = exemplar_documents("date_understanding")[0]["prompt"].rpartition("\n\nQ:")[0]
    asked = [exemplar["input"] for task in TASKS for exemplar in exemplar_documents(task)]
    until = {"until": ["\n\n"], "max_gen_toks": 1, "do_sample": False}
    prompts = [f"{solved}\n\nQ: {question}{THOUGHT}" for question in asked]
    yield (
        "BBH, shots read (floor 5)",
        [Instance("generate_until", {}, (prompt, until), i) for i, prompt in enumerate(prompts)],
    )


def _choices(before: str, questions: list[dict[str, Any]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (before + question["query"], f" {choice}"), index)
        for index, question in enumerate(questions)
        for choice in question["choices"]
    ]
