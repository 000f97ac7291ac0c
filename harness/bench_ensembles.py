"""`python -m harness.bench ensembles`: what an ensemble costs beside its members, one by one.

Scoring: seconds of the ensemble over the sum of its members' for the same requests. Generation:
seconds of the ensemble over the sum, over its members, of the seconds each alone takes for as many
bytes of text after the same prompts. All in one process, in turn; the fastest of some repetitions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fusion.errors import RunError
from fusion.vocabulary import build as build_map
from harness.assets import prepare_data
from harness.build import build
from harness.ensembles import EnsembleLM
from harness.model_folder import model_folder
from harness.plan import plan
from harness.progress import say
from harness.recipe import load
from harness.scoring import Instance, SharedPrefixLM
from harness.store import home

SOURCES = ("smollm2", "gemma3")
SCORED = ("mean_probability", "packllm_sim", "packllm_opt", "mean_logit", "byte_exact")
SPOKEN = ("mean_probability", "packllm_sim", "mean_logit")
NEW = 32  # tokens a generation


def ensembles() -> None:
    """Scoring and generation of SmolLM2 with Gemma, by rule, against each alone."""
    planned = plan(load("quickstart").recipe, home())
    failed = build(planned, list(SOURCES))
    if failed:
        raise RunError("; ".join(failed.values()))
    members = [SharedPrefixLM(str(model_folder(planned, row))) for row in SOURCES]
    maps = [build_map(members[1].tokenizer, members[0].tokenizer)]
    mixed = {rule: EnsembleLM(members, rule, {}, maps) for rule in {*SCORED, *SPOKEN}}
    for label, requests, rules in _questions():
        works: list[Any] = [*members, *(mixed[rule] for rule in rules)]
        seconds, read = _in_turn([partial(_positions, work, requests) for work in works])
        for at, rule in enumerate(rules, len(members)):
            ratio, more = (row[at] / sum(row[: len(members)]) for row in (seconds, read))
            say(
                f"{label}, {rule:<17}{ratio:>6.2f} times its members (floor 1.15), reading "
                f"{more:.2f} times their positions"
            )
    works = [*members, *(mixed[rule] for rule in SPOKEN)]
    prompts = _prompts()
    seconds, made = _in_turn([partial(work.generate, prompts) for work in works])
    sizes = [sum(len(one.text.encode()) for one in found) for found in made]
    for at, rule in enumerate(SPOKEN, len(members)):
        each = [seconds[m] / sizes[m] * sizes[at] for m in range(len(members))]
        label = f"{len(prompts)} texts of {NEW} tokens, {rule}"
        say(f"{label:<44}{seconds[at] / sum(each):>6.2f} times its members (floor 1.5)")


def _positions(work: Any, requests: list[Instance]) -> int:
    """Score requests; how many positions that took, of all members together."""
    before = work.forward_tokens
    work.loglikelihood(requests)
    return int(work.forward_tokens - before)


def _in_turn(works: list[Callable[[], Any]], repeat: int = 2) -> tuple[list[float], list[Any]]:
    """Seconds of the fastest repetition of each work, and what it gave.

    On the CPU seconds of this process alone, so that what else runs does not count.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds, found = [float("inf")] * len(works), [None] * len(works)
    for _ in range(repeat):
        for index, work in enumerate(works):
            started = clock()
            found[index] = work()
            seconds[index] = min(seconds[index], clock() - started)
    return seconds, found


def _questions() -> Iterator[tuple[str, list[Instance], tuple[str, ...]]]:
    data = prepare_data(("hellaswag", "arc_challenge"), home())
    hellaswag, arc = (
        [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("hellaswag", "arc_challenge")
    )
    shots = "".join(f"{q['query']} {q['choices'][q['gold']]}\n\n" for q in arc[:5])
    yield "HellaSwag, no shots", _choices("", hellaswag[:6]), SCORED
    yield "ARC-c, 5 shots", _choices(shots, arc[5:11]), ("mean_probability", "packllm_sim")


def _choices(before: str, questions: list[dict[str, Any]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (before + question["query"], f" {choice}"), index)
        for index, question in enumerate(questions)
        for choice in question["choices"]
    ]


def _prompts() -> list[Instance]:
    data = prepare_data(("hellaswag",), home())
    lines = (data / "hellaswag.jsonl").read_text().splitlines()[:8]
    asked = {"until": ["never-said"], "max_gen_toks": NEW, "do_sample": False}
    return [
        Instance("generate_until", {}, (json.loads(line)["query"], asked), index)
        for index, line in enumerate(lines)
    ]
