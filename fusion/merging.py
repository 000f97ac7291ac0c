"""Merge methods: combine the same tensor of several models into one.

A method is a plain function of (tensors, base) and its line in MERGE_METHODS at the foot; its
keyword parameters can be given in a recipe. Its family's file has it. Which tensors, from which
model folders, is `checkpoints.py`.

Symbols: θ_i the models in the recipe's order, θ_0 the base, τ_i = θ_i − θ_0, M models, w_i weights.
All tensors of one call have one shape, any, and one precision; the result has both. It is float32
(float64 where that was given), and not a bit of it depends on the order of the models or the number
of threads.

What a method must know beyond one tensor's numbers, it takes by keyword, and does without by
default: `name` of the tensor, `models` (what tells them apart), `start` (place of the first
element, if rows of a tensor are given), `found` (what its line in STATISTICS found over the tensor
or the model), `statistics` (what its line in COLLECTED says of each model, see `statistics.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fusion.columns import column_changes, widen
from fusion.geometry import (
    change_products,
    karcher,
    model_products,
    model_stock,
    slerp,
)
from fusion.informed import fisher, regmean
from fusion.means import linear, squared_changes, task_arithmetic, varm
from fusion.selection import sce_fusechat, sce_mergekit, sce_paper, select
from fusion.sparse import (
    dare_linear,
    dare_ties,
    largest_changes,
    ties_mergekit,
    ties_paper,
    trim,
)

if TYPE_CHECKING:
    from torch import Tensor

# Given by who reads the files, not by a recipe.
CONTEXT = ("name", "models", "start", "found", "statistics")


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """What a recipe may set for a merge method: keyword-only, but for the context."""
    found = inspect.signature(MERGE_METHODS[name]).parameters
    keyword = inspect.Parameter.KEYWORD_ONLY
    return {k: p for k, p in found.items() if p.kind is keyword and k not in CONTEXT}


def needs_base(name: str) -> bool:
    """Whether a method works on changes against a base."""
    return "None" not in str(inspect.signature(MERGE_METHODS[name]).parameters["base"].annotation)


def context(name: str) -> set[str]:
    """What a method takes beside the tensors and a recipe's parameters."""
    return set(inspect.signature(MERGE_METHODS[name]).parameters) & set(CONTEXT)


def over_model(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a method's statistics are of the whole model rather than of each tensor."""
    return name == "ties@paper" or given.get("granularity", "matrix") != "matrix"


def by_rows(name: str, given: Mapping[str, Any]) -> bool:
    """Whether rows can be merged by themselves, once the statistics are known."""
    return name in _BY_ROWS and given.get("rescale") != "norm@mergekit"


MERGE_METHODS: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "slerp": slerp,
    "karcher": karcher,
    "task_arithmetic": task_arithmetic,
    "ties@paper": ties_paper,
    "ties@mergekit": ties_mergekit,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "sce": sce_paper,
    "sce@paper": sce_paper,
    "sce@mergekit": sce_mergekit,
    "sce@fusechat": sce_fusechat,
    "varm": varm,
    "model_stock": model_stock,
    "widen": widen,
    "fisher": fisher,
    "regmean": regmean,
}

# Of the method's own parameters, those by these functions' names are passed on.
STATISTICS: dict[str, Callable[..., Any]] = {
    "slerp": model_products,
    "karcher": model_products,
    "model_stock": change_products,
    "ties@paper": trim,
    "varm": squared_changes,
    "ties@mergekit": largest_changes,
    "sce": partial(select, least=1),
    "sce@paper": partial(select, least=1),
    "sce@mergekit": partial(select, select_topk=1.0),
    "sce@fusechat": select,
    "widen": column_changes,
}

# Statistics of each model on the corpus, and which of the method's parameters they are made with.
COLLECTED = {"fisher": ("fisher", ("blocks", "labels")), "regmean": ("gram", ("blocks",))}

_BY_ROWS = (
    frozenset(STATISTICS)
    | frozenset(COLLECTED)
    | {"linear", "task_arithmetic", "dare_linear", "dare_ties"}
)
