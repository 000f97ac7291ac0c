"""What a recipe's names refer to: rows, methods, parameters, suites.

Checks on the file as it was read, so that they can speak even where its shape is wrong. Each yields
problems as (path in the file, what is wrong).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.suite import load_suite

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@=,+\[\]-]*")
Problems = Iterator[tuple[str, str]]


def _mapping(raw: Mapping, key: str) -> dict[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def _list(raw: Mapping, key: str) -> list[Any]:
    value = raw.get(key)
    return value if isinstance(value, list) else []


def _variants(raw: Mapping) -> Iterator[tuple[str, str, dict]]:
    for name, variant in _mapping(raw, "variants").items():
        for kind in ("train", "merge", "ensemble"):
            if isinstance(variant, dict) and isinstance(variant.get(kind), dict):
                yield str(name), kind, variant[kind]


def names(raw: Mapping) -> Problems:
    """Row names, and that each variant is one thing."""
    sources, variants = _mapping(raw, "sources"), _mapping(raw, "variants")
    for section, names in (("sources", sources), ("variants", variants)):
        for name in names:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                yield f"{section}.{name}", "a row's name is letters, digits and _ . - @"
    for name in variants:
        if name in sources:
            yield f"variants.{name}", "a source has this name already"
        kinds = [k for k in ("train", "merge", "ensemble") if (variants[name] or {}).get(k)]
        if isinstance(variants[name], dict) and len(kinds) != 1:
            yield f"variants.{name}", "needs exactly one of train, merge, ensemble"
    if not isinstance(raw.get("corpus"), dict) and any(k == "train" for _, k, _ in _variants(raw)):
        yield "corpus", "missing: a trained variant needs one"


def references(raw: Mapping) -> Problems:
    """Rows that are named but not there, and variants that need themselves."""
    sources, variants = list(_mapping(raw, "sources")), list(_mapping(raw, "variants"))
    needs: dict[str, list[str]] = {}

    def check(path: str, value: Any, known: list[str]) -> Problems:
        if isinstance(value, str) and value not in known:
            yield path, f"'{value}' is no row here; rows: {', '.join(known)}{close(value, known)}"

    for name, kind, section in _variants(raw):
        at = f"variants.{name}.{kind}"
        fuse = _mapping(section, "fuse")
        named = [(f"{at}.{key}", section.get(key)) for key in ("init", "base")]
        for key in ("inputs", "members"):
            named += [(f"{at}.{key}[{i}]", row) for i, row in enumerate(_list(section, key))]
        named += [(f"{at}.fuse.sources[{i}]", v) for i, v in enumerate(_list(fuse, "sources"))]
        for path, value in named:
            yield from check(path, value, [*sources, *variants])
        needs[name] = [str(value) for _, value in named if value in variants]
    yield from check("reference", raw.get("reference"), [*sources, *variants])
    ensembles = {name for name, kind, _ in _variants(raw) if kind == "ensemble"}
    for name, wanted in needs.items():
        if name in _reach(name, needs):
            yield f"variants.{name}", "needs itself through its inputs"
        yield from (
            (f"variants.{name}", f"'{other}' is an ensemble: it has no weights to build on")
            for other in wanted
            if other in ensembles
        )


def _reach(name: str, needs: Mapping[str, Sequence[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(needs.get(name, ()))
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += needs.get(current, ())
    return found


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
        elif kind == "merge":
            from fusion.merging import MERGE_METHODS, needs_base
            from fusion.merging import parameters as merge_parameters

            if str(section.get("method")).startswith("mergekit:"):
                yield from _mergekit(at, section)
                continue
            yield from _method(f"{at}.method", section, "method", MERGE_METHODS, merge_parameters)
            method = section.get("method")
            if method in MERGE_METHODS and needs_base(method) and not section.get("base"):
                yield f"{at}.base", f"missing: '{method}' works on changes against a base"
        elif kind == "ensemble":
            from harness.rules import ENSEMBLE_RULES
            from harness.rules import parameters as rule_parameters

            yield from _method(f"{at}.rule", section, "rule", ENSEMBLE_RULES, rule_parameters)


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
    allowed = list(parameters(name))
    for parameter in given:
        if parameter not in allowed:
            listed = ", ".join(allowed) or "none"
            yield (
                f"{path.rpartition('.')[0]}.parameters.{parameter}",
                f"'{name}' has no such parameter; allowed: {listed}{close(parameter, allowed)}",
            )


def suites(raw: Mapping) -> Problems:
    """Suites, and limits for them."""
    evaluate = _mapping(raw, "evaluate")
    suites = _list(evaluate, "suites")
    for index, suite in enumerate(suites):
        if not isinstance(suite, str) or suite.startswith("lm_eval:"):
            continue
        try:
            load_suite(suite)
        except ValueError as error:
            yield f"evaluate.suites[{index}]", str(error)
    limit = evaluate.get("limit")
    for suite, count in limit.items() if isinstance(limit, dict) else ():
        if suite not in suites:
            known = ", ".join(map(str, suites))
            yield f"evaluate.limit.{suite}", f"not among evaluate.suites: {known}"
        elif isinstance(count, int) and count < 1:
            yield f"evaluate.limit.{suite}", f"{count} is not right; should be at least 1"
    if isinstance(limit, int) and limit < 1:
        yield "evaluate.limit", f"{limit} is not right; should be at least 1"


def close(word: str, known: Sequence[str]) -> str:
    """The nearest known word in brackets, if one is near."""
    match = difflib.get_close_matches(word, known, n=1)
    return f" ({match[0]}?)" if match else ""
