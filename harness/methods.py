"""What a recipe's methods are called and take: fusion functions, maps, merges, ensemble rules.

As in `harness.checks`, on the file as it was read; each yields problems as (path, what is wrong).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.checks import Problems, _list, _mapping, _variants, close


def methods(raw: Mapping) -> Problems:
    """Names and parameters of fusion functions, vocabulary maps, merge methods, ensemble rules."""
    for name, kind, section in _variants(raw):
        at = f"variants.{name}.{kind}"
        if kind == "train" and isinstance(section.get("fuse"), dict):
            from fusion.functions import FUSION_FUNCTIONS, parameters
            from fusion.losses import OBJECTIVES
            from fusion.spec import REFERENCE
            from fusion.vocabulary import VOCABULARY_MAPS

            fuse = section["fuse"]
            if fuse.get("fidelity") == "reference":
                fuse = REFERENCE | fuse
            yield from _method(
                f"{at}.fuse.function", fuse, "function", FUSION_FUNCTIONS, parameters
            )
            yield from _method(f"{at}.fuse.vocabulary", fuse, "vocabulary", VOCABULARY_MAPS, None)
            known = OBJECTIVES | {"alm": None}
            yield from _method(f"{at}.fuse.objective", fuse, "objective", known, None)
            yield from _unfit(f"{at}.fuse", fuse)
            yield from _mutual(f"{at}.fuse", fuse, section.get("init"))
        elif kind == "merge":
            from fusion.merging import MERGE_METHODS, needs_base
            from fusion.merging import parameters as merge_parameters

            yield from _merged(at, section)
            if str(section.get("method")).startswith("mergekit:"):
                yield from _mergekit(at, section)
                continue
            yield from _method(f"{at}.method", section, "method", MERGE_METHODS, merge_parameters)
            method = section.get("method")
            if (
                isinstance(method, str)
                and method in MERGE_METHODS
                and needs_base(method)
                and not section.get("base")
            ):
                yield f"{at}.base", f"missing: '{method}' works on changes against a base"
        elif kind == "ensemble":
            from harness.rules import ENSEMBLE_RULES
            from harness.rules import parameters as rule_parameters

            found = list(_method(f"{at}.rule", section, "rule", ENSEMBLE_RULES, rule_parameters))
            yield from found or _weighed(at, section)


def _weighed(path: str, ensemble: Mapping) -> Problems:
    """Values of an ensemble's rule, weights and level; wrong types are told elsewhere."""
    from harness.rules import ENSEMBLE_RULES, problems

    rule, given = ensemble.get("rule"), ensemble.get("parameters") or {}
    weights, level = ensemble.get("weights"), ensemble.get("level")
    right = isinstance(given, dict) and all(isinstance(v, int | float) for v in given.values())
    if not isinstance(rule, str) or rule not in ENSEMBLE_RULES or not right:
        return
    if weights is not None and not (
        isinstance(weights, list) and all(isinstance(w, int | float) for w in weights)
    ):
        weights = None
    level = level if isinstance(level, str) else None
    for key, what in problems(rule, given, len(_list(ensemble, "members")), weights, level):
        yield f"{path}.{key}", what


def _unfit(path: str, fuse: Mapping) -> Problems:
    """Values of a fuse section that are right alone, but not together."""
    function = fuse.get("function")
    if fuse.get("objective") == "alm" and function not in ("min_ce", "avg_ce"):
        yield (
            f"{path}.function",
            "objective 'alm' compares chunks: only min_ce or avg_ce weigh them",
        )
    if fuse.get("level") == "span" and str(function).endswith("@reference"):
        yield f"{path}.level", "nats a token mean nothing below a document: block or document"


def _mutual(path: str, fuse: Mapping, init: Any) -> Problems:
    """dual_min_ce compares others with the target itself, which it takes to come first."""
    sources = _list(fuse, "sources")
    if fuse.get("function") != "dual_min_ce" or not sources:
        return
    if sources[0] != init or len(sources) < 2:
        others = ", ".join(str(s) for s in sources if s != init) or "OTHER"
        yield (
            f"{path}.sources",
            "dual_min_ce learns where others are better than the target was: name the row of init "
            f"first, then at least one other: [{init}, {others}]",
        )


def _merged(at: str, section: Mapping) -> Problems:
    """Values of a merge's parameters that can be told wrong before anything is trained for it."""
    given, count = _mapping(section, "parameters"), len(_list(section, "inputs"))
    floor, seed = given.get("floor", 1), given.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        yield f"{at}.parameters.seed", f"{seed!r} is not right; should be a whole number"
    if str(section.get("method")).startswith("mergekit:"):
        return  # what else they say is mergekit's
    for key in ("weights", "density"):
        value = given.get(key)
        if isinstance(value, list) and count and len(value) != count:
            yield f"{at}.parameters.{key}", f"{len(value)} for {count} inputs; give one for each"
    if isinstance(floor, int | float) and not floor > 0:
        yield f"{at}.parameters.floor", f"{floor} is not right; should be greater than 0"


def _mergekit(at: str, section: Mapping) -> Problems:
    """What kfuse does not do for mergekit; its methods and their parameters are its own."""
    if section.get("pad"):
        yield f"{at}.pad", "not with mergekit: its configuration has a tokenizer section for that"
    parameters = _mapping(section, "parameters")
    if parameters.get("models") is not None and len(_list(parameters, "models")) != len(
        _list(section, "inputs")
    ):
        yield f"{at}.parameters.models", "should be a list of mappings, one for each of the inputs"


def _method(
    path: str, section: Mapping, key: str, known: Mapping[str, Any], parameters: Any
) -> Problems:
    name = section.get(key)
    if not isinstance(name, str):
        return
    if name not in known:
        yield path, f"'{name}' is unknown; known: {', '.join(known)}{close(name, list(known))}"
        return
    given = section.get("parameters")
    if parameters is None or not isinstance(given, dict):
        return
    allowed = parameters(name)
    for parameter, value in given.items():
        at = f"{path.rpartition('.')[0]}.parameters.{parameter}"
        if parameter not in allowed:
            listed = ", ".join(allowed) or "none"
            hint = close(parameter, list(allowed))
            yield at, f"'{name}' has no such parameter; allowed: {listed}{hint}"
            continue
        kind = allowed[parameter].annotation
        fits, what = _KINDS.get(getattr(kind, "__name__", kind), (object, ""))
        if not isinstance(value, fits) or (isinstance(value, bool) and fits is not bool and what):
            yield at, f"{value!r} is not right; should be {what}"


_KINDS: dict[str, tuple[Any, str]] = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
}
