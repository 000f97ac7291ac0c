"""How much a suite asks, before any compute: tokens, and the smallest gain that it can show.

Tokens are counted on a sample of each task's questions, by the tokenizers that are here. Questions
that cannot be had are said to be unknown.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusion.conversations import CHAT, words
from fusion.errors import RunError
from harness.evaluate import Item, Loaded
from harness.steps import Plan, Step, root
from reports.corpus import CORPUS_METRICS

SAMPLED = 25  # questions of a task whose tokens are counted
PACK = 64  # questions that share one reading of what all of a task's prompts begin with
DISAGREE = (0.05, 0.20)  # shares of items on which two rows differ, between which most pairs lie
UNLIKE = {"bits_per_byte", "rating", *CORPUS_METRICS}  # whose items are not right or wrong


@dataclass(frozen=True)
class Questions:
    """A suite of the recipe: how much is asked, and the smallest gain that this can show."""

    suite: str
    n: int
    n_total: int
    detectable: tuple[float, float] | None  # for DISAGREE; None for what is not right or wrong
    read: dict[str, float]  # tokens by root source; reading prompts and choices once
    written: int  # tokens at most
    reason: str = ""  # why nothing is known
    alone: tuple[tuple[str, int, tuple[float, float] | None], ...] = ()  # tasks without an average


def counted(plan: Plan, measuring: Any, step: Step) -> Questions:
    """What a measurement's suite asks; measuring: a `Measuring` of the plan."""
    try:
        loaded: Loaded = measuring.suite(step)
    except RunError as error:
        return Questions(step.name, 0, 0, None, {}, 0, str(error))
    by_task: dict[str, list[Item]] = {}
    for item in loaded.items:
        by_task.setdefault(item.task, []).append(item)
    sampled = {task: items[:: max(1, len(items) // SAMPLED)] for task, items in by_task.items()}
    written = sum(_written(items) for items in by_task.values())
    read = {}
    for name in dict.fromkeys(root(plan.recipe, row) for row in plan.recipe.rows):
        count = _counter(plan, name)
        read[name] = sum(_read(sampled[task], len(items), count) for task, items in by_task.items())
    total, suite = sum(loaded.totals.values()), loaded.suite
    sizes = {task.title: len(by_task[task.name]) for task in suite.tasks if task.name in by_task}
    right = {task.title for task in suite.tasks if task.metric not in UNLIKE}
    if suite.rule == "apart":  # no average: each task stands for itself
        alone = tuple((t, n, _shown([n]) if t in right else None) for t, n in sizes.items())
        return Questions(step.name, len(loaded.items), total, None, read, written, alone=alone)
    shown = _shown(list(sizes.values())) if right >= set(sizes) else None
    return Questions(step.name, len(loaded.items), total, shown, read, written)


def _shown(sizes: Sequence[int]) -> tuple[float, float]:
    """The smallest gains of an unweighted mean over tasks of these sizes, for DISAGREE."""
    from reports.statistics import minimum_detectable_effect

    share = sum(1 / n for n in sizes) / len(sizes) ** 2
    low, high = (minimum_detectable_effect(d * share, 1) for d in DISAGREE)
    return low, high


def _counter(plan: Plan, row: str) -> Any:
    """Text to a number of tokens: by a source's tokenizer if it is here, else bytes over four."""
    from fusion.models import load_tokenizer
    from harness.model_folder import model_folder

    folder = model_folder(plan, row, weights=False) if plan.folders[row] else None
    if folder is None or not (folder / "config.json").is_file():
        return lambda text: len(text.encode()) / 4
    tokenizer = load_tokenizer(folder)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _read(sampled: Sequence[Item], n: int, count: Any) -> float:
    """Tokens of n items: contexts and choices once, what all prompts begin with once a pack."""
    prompts = [_said(item.prompt) for item in sampled]
    shared = os.path.commonprefix(prompts) if len(prompts) > 1 else ""
    own = sum(count(text.removeprefix(shared)) for item in sampled for text in _texts(item)) / len(
        sampled
    )
    return own * n + count(shared) * -(-n // PACK)


def _texts(item: Item) -> list[str]:
    """Every text that is read for an item, contexts that requests share once."""
    texts = dict.fromkeys(_said(str(request.args[0])) for request in item.requests)
    kind = item.requests[0].request_type
    choices = [str(r.args[1]) for r in item.requests] if kind == "loglikelihood" else []
    return [*texts, *choices]


def _said(prompt: str) -> str:
    """A prompt as it is read, but for what a template writes around a conversation."""
    return words(prompt) if prompt.startswith(CHAT) else prompt


def _written(items: Sequence[Item]) -> int:
    """Tokens that items may write at most."""
    return sum(
        int(request.args[1].get("max_gen_toks", 256)) * int(request.repeats or 1)
        for item in items
        for request in item.requests
        if request.request_type == "generate_until"
    )
