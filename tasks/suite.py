"""What a suite is, and how one is found by name.

A suite is a file of this room whose name is the suite's name, with __ for @ (`commonsense@fusellm`
is a paper's protocol); it holds one literal SUITE. Its tasks are lm-eval tasks, defined in
`definitions/`. Nothing here measures anything: harness does.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOM = Path(__file__).parent
DEFINITIONS = ROOM / "definitions"  # lm-eval's include_path

_NOT_SUITES = (
    "__init__",
    "suite",
    "datasets",
    "domains",
    "questions",
    "open_questions",
    "published",
    "published_chat",
)
_BBH = (
    "suite 'bbh': name the protocol. bbh@fusellm has all 6,511 questions, from the hub or a local "
    "copy (HF_DATASETS_CACHE); lm_eval:bbh_cot_fewshot is lm-eval's; bbh81 asks the 81 solved "
    "exemplars, which come with lm-eval, and its scores are no BBH scores"
)


@dataclass(frozen=True, slots=True)
class Task:
    """One lm-eval task and the metric that counts."""

    name: str  # as lm-eval knows it
    metric: str  # the primary metric
    higher_is_better: bool
    chance: float | None  # score of guessing, a fraction; None where guessing has no meaning
    title: str  # for tables
    filter: str = "none"  # lm-eval's filter whose answers count
    shots: int = 0  # solved examples in the prompt, also where the prompt text holds them


@dataclass(frozen=True, slots=True)
class Suite:
    """Tasks, one primary metric each, and one rule that aggregates them.

    rule: "macro" is the unweighted mean over tasks; "apart" takes no mean, since the tasks' scores
    have no common scale: each task is reported as a suite of its own. datasets: keys of
    `datasets.DATASETS` that must be there before lm-eval can load the tasks. without: tasks that a
    second average leaves out, as their published scores cannot be trusted. chat: asked as
    conversations by each model's own template, as plain text where a model has none. stock:
    lm-eval's own task file, below its `tasks`, whose splits are our datasets. needs: modules that
    its scorer imports and kfuse does not.
    """

    name: str
    title: str
    tasks: tuple[Task, ...]
    rule: Literal["macro", "apart"] = "macro"
    executes_code: bool = False
    judged: Literal["", "rating", "preference"] = ""  # by another model: alone, or beside another
    datasets: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    reference: str = ""  # the paper whose column it mirrors
    # Not in the representation, of which `harness.hashing` makes the hash of suites without them.
    chat: bool = field(default=False, repr=False)
    stock: str = field(default="", repr=False)
    splits: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    needs: tuple[str, ...] = field(default=(), repr=False)


def known_suites() -> list[str]:
    """Names of all suites, sorted."""
    stems = [path.stem for path in ROOM.glob("*.py") if path.stem not in _NOT_SUITES]
    return sorted(stem.replace("__", "@") for stem in stems)


def load_suite(name: str) -> Suite:
    """The suite of that name; ValueError lists the known ones and a close match."""
    known = known_suites()
    if name == "bbh":
        raise ValueError(_BBH)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" ({close[0]}?)" if close else ""
        raise ValueError(
            f"suite '{name}' is unknown; known: {', '.join(known)}{hint}; "
            "a stock task of lm-eval is written lm_eval:TASK"
        )
    module = name.replace("@", "__")
    suite = importlib.import_module(f"tasks.{module}").SUITE
    if suite.name != name:
        raise ValueError(f"tasks/{module}.py holds the suite '{suite.name}'; name both alike")
    return suite
