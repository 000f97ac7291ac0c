"""What a recipe's names refer to: rows, corpora, suites; methods are `harness.methods`'.

Checks on the file as it was read, so that they can speak even where its shape is wrong. Each yields
problems as (path in the file, what is wrong).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fusion.errors import RunError
from tasks.suite import load_suite

KINDS = ("train", "merge", "ensemble", "repeat")
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
        for kind in KINDS:
            if isinstance(variant, dict) and isinstance(variant.get(kind), dict):
                yield str(name), kind, variant[kind]


def names(raw: Mapping) -> Problems:
    """Row names, and that each variant is one thing."""
    sources, variants = _mapping(raw, "sources"), _mapping(raw, "variants")
    for section, names in (("sources", sources), ("variants", variants)):
        for name in names:
            if not isinstance(name, str):
                what = f"YAML reads this name as {name} ({type(name).__name__}); put it in quotes"
                yield f"{section}.{name}", what
            elif not NAME.fullmatch(name):
                yield f"{section}.{name}", "a row's name is letters, digits and _ . - @"
    for name in variants:
        if name in sources:
            yield f"variants.{name}", "a source has this name already"
        kinds = [k for k in KINDS if _mapping(variants, name).get(k)]
        if isinstance(variants[name], dict) and len(kinds) != 1:
            yield f"variants.{name}", f"needs exactly one of {', '.join(KINDS)}"
    if not isinstance(raw.get("corpus"), dict) and any(k == "train" for _, k, _ in _variants(raw)):
        yield "corpus", "missing: a trained variant needs one"


def references(raw: Mapping) -> Problems:
    """Rows that are named but not there, and variants that need themselves."""
    sources, variants = list(_mapping(raw, "sources")), list(_mapping(raw, "variants"))
    needs: dict[str, list[str]] = {}

    def check(path: str, value: Any, known: list[str]) -> Problems:
        if isinstance(value, str) and value not in known:
            rows = [str(row) for row in known]
            listed = ", ".join(rows) or "none"
            yield path, f"'{value}' is no row here; rows: {listed}{close(value, rows)}"

    for name, kind, section in _variants(raw):
        at = f"variants.{name}.{kind}"
        fuse = _mapping(section, "fuse")
        named = [(f"{at}.{key}", section.get(key)) for key in ("init", "base", "budget", "row")]
        for key in ("inputs", "members"):
            named += [(f"{at}.{key}[{i}]", row) for i, row in enumerate(_list(section, key))]
        fused = _list(fuse, "sources")
        named += [(f"{at}.fuse.sources[{i}]", row) for i, row in enumerate(fused)]
        twice = [(i, row) for i, row in enumerate(fused) if row in fused[:i]]
        yield from ((f"{at}.fuse.sources[{i}]", f"'{row}' is named twice") for i, row in twice)
        for path, value in named:
            yield from check(path, value, [*sources, *variants])
        needs[name] = [str(value) for _, value in named if value in variants]
    yield from check("reference", raw.get("reference"), [*sources, *variants])
    weightless = {name: kind for name, kind, _ in _variants(raw) if kind in ("ensemble", "repeat")}
    for name, wanted in needs.items():
        if name in _reach(name, needs):
            yield f"variants.{name}", "needs itself through its inputs"
        yield from (
            (
                f"variants.{name}",
                f"'{other}' is {_ARTICLE[weightless[other]]}: it has no weights to build on",
            )
            for other in wanted
            if other in weightless
        )


_ARTICLE = {"ensemble": "an ensemble", "repeat": "a repeat"}


def budgets(raw: Mapping) -> Problems:
    """Trained rows that are to cost what another row does: which row that may be, and what not."""
    trained = {name: section for name, kind, section in _variants(raw) if kind == "train"}
    for name, section in trained.items():
        row, at = section.get("budget"), f"variants.{name}.train"
        if row is None:
            continue
        if row in [*_mapping(raw, "sources"), *_mapping(raw, "variants")]:
            if row not in trained:
                yield f"{at}.budget", f"'{row}' is not trained: it has no FLOPs to come to"
            elif trained[row].get("budget"):
                yield f"{at}.budget", f"'{row}' has a budget itself; name the row that sets it"
        if section.get("fuse"):
            yield f"{at}.budget", "only plain training takes a budget; leave out fuse or budget"
        if "epochs" in section:
            yield f"{at}.epochs", "the budget decides how long it trains; leave out one of them"


def _reach(name: str, needs: Mapping[str, Sequence[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(needs.get(name, ()))
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += needs.get(current, ())
    return found


def _counts(*values: Any) -> bool:
    return all(isinstance(value, int) and value > 0 for value in values)


def processes(raw: Mapping) -> Problems:
    """How processes share the model that they train."""
    from fusion.sharding import DEEPSPEED
    from fusion.spec import Train

    machine = _mapping(raw, "machine")
    count, hosts = machine.get("processes", 1), machine.get("hosts", 1)
    most = Train.model_fields["batch_blocks"].default
    if _counts(count, hosts):
        count *= hosts
    everywhere = " on all hosts" if hosts != 1 else ""
    for variant, kind, section in _variants(raw):
        blocks = section.get("batch_blocks", most)
        if kind == "train" and _counts(count, blocks) and blocks % count:
            allowed = ", ".join(str(n) for n in range(1, blocks + 1) if blocks % n == 0)
            yield (
                "machine.processes",
                f"{count}{everywhere} cannot share evenly the {blocks} blocks of an optimizer "
                f"step (variants.{variant}.train.batch_blocks); allowed: {allowed}",
            )
    name = machine.get("deepspeed")
    if isinstance(name, str) and name not in DEEPSPEED and not Path(name).is_file():
        known = list(DEEPSPEED)
        yield (
            "machine.deepspeed",
            (f"'{name}' is no file and none of {', '.join(known)}{close(name, known)}"),
        )
    if machine.get("fsdp") is True:
        if name:
            yield "machine.fsdp", "a model is shared by this or by DeepSpeed; leave out one of them"
        if count == 1:
            yield "machine.fsdp", "one process has nobody to share with; say `processes` too"
    yield from _adapters(raw, machine)


def _adapters(raw: Mapping, machine: Mapping) -> Problems:
    """Rows that train adapters where processes would cut the model into pieces."""
    from fusion.sharding import sharding

    name, how = machine.get("deepspeed"), "none"
    with suppress(RunError):  # no DeepSpeed file: told already
        how = sharding(name if isinstance(name, str) else None, machine.get("fsdp") is True)
    if how in ("none", "zero2"):
        return
    for row, kind, section in _variants(raw):
        if kind == "train" and section.get("lora") is not None:
            yield (
                f"variants.{row}.train.lora",
                f"not with {how}, which cuts the model into pieces; adapters train in whole "
                "copies: `deepspeed: zero2`, or leave out deepspeed and fsdp",
            )


def tiny(raw: Mapping) -> Problems:
    """A corpus or a source that would be made on the spot, but is none of those there are."""
    from harness.tiny import CORPORA, MODELS

    given = [("corpus.path", _mapping(raw, "corpus").get("path"), list(CORPORA))]
    for name, source in _mapping(raw, "sources").items():
        if isinstance(source, dict):
            given.append((f"sources.{name}.path", source.get("path"), list(MODELS)))
    for at, path, names in given:
        known = [f"tiny:{name}" for name in names]
        if isinstance(path, str) and path.startswith("tiny:") and path not in known:
            yield at, f"'{path}' is unknown; known: {', '.join(known)}{close(path, known)}"


def statistics(raw: Mapping) -> Problems:
    """Merges that read the corpus: that there is one, and how much of it they read."""
    from fusion.merging import COLLECTED

    for name, kind, section in _variants(raw):
        method = section.get("method")
        if kind != "merge" or not isinstance(method, str) or method not in COLLECTED:
            continue
        corpus = raw.get("corpus")
        if not isinstance(corpus, dict):
            yield "corpus", f"missing: '{method}' takes statistics of the models on one"
            corpus = {}
        given = _mapping(section, "parameters")
        at = f"variants.{name}.merge.parameters"
        labels = given.get("labels", "data")
        if "labels" in COLLECTED[method][1] and labels not in ("data", "model"):
            yield f"{at}.labels", f"'{labels}' is unknown; known: data, model"
        blocks, tokens, size = given.get("blocks", 1), corpus.get("tokens"), corpus.get("blocks")
        if not isinstance(blocks, int):
            continue  # told as a wrong kind
        if blocks < 1:
            yield f"{at}.blocks", f"{blocks!r} is not right; should be a number of blocks"
        if isinstance(tokens, int) and isinstance(size, int) and blocks * size > tokens > size > 0:
            there = tokens // size
            yield f"{at}.blocks", f"{blocks} is not right; the corpus has {there} blocks"


def kept(raw: Mapping) -> Problems:
    """Variants that are kept as a difference: from weights that can be had exactly."""
    variants = _mapping(raw, "variants")
    sections = {n: v["keep"] for n, v in variants.items() if isinstance(v, dict) and v.get("keep")}
    weightless = {name: kind for name, kind, _ in _variants(raw) if kind in _ARTICLE}
    bases: dict[str, list[str]] = {}
    rows = [*_mapping(raw, "sources"), *variants]
    for name, section in sections.items():
        at = f"variants.{name}.keep"
        variant = variants[name]
        if name in weightless:
            yield at, f"{_ARTICLE[weightless[name]]} has no weights to keep"
        if not isinstance(section, dict):
            continue
        train, merge = _mapping(variant, "train"), _mapping(variant, "merge")
        base = section.get("base") or train.get("init") or merge.get("base")
        base = base or next(iter(_list(merge, "inputs")), None)
        if not isinstance(base, str):
            continue
        if base not in rows or base == name:
            yield f"{at}.base", f"'{base}' is no other row; rows: {', '.join(map(str, rows))}"
        elif base in weightless:
            yield f"{at}.base", f"'{base}' is {_ARTICLE[weightless[base]]}: it has no weights"
        elif _mapping(sections, base).get("bits", "exact") != "exact":
            yield f"{at}.base", f"'{base}' is itself kept with a loss; keep it exact, or whole"
        else:
            bases[name] = [base]
    for name in bases:
        if name in _reach(name, bases):
            yield f"variants.{name}.keep.base", "its weights would come back from themselves only"


def suites(raw: Mapping) -> Problems:
    """Suites, and limits for them."""
    evaluate = _mapping(raw, "evaluate")
    suites = _list(evaluate, "suites")
    for index, suite in enumerate(suites):
        if isinstance(suite, str) and suite in suites[:index]:
            yield f"evaluate.suites[{index}]", f"'{suite}' is named twice"
        if not isinstance(suite, str) or suite.startswith("lm_eval:"):
            continue
        try:
            load_suite(suite)
        except ValueError as error:
            yield f"evaluate.suites[{index}]", str(error)
    if "response_bits_per_byte" in suites and not _mapping(raw, "corpus").get("heldout"):
        yield "corpus.heldout", "missing: response_bits_per_byte measures its conversations"
    judge = _mapping(evaluate, "judge")
    if isinstance(judge.get("model"), str) and not judge.get("endpoint"):
        sources = list(map(str, _mapping(raw, "sources")))
        if judge["model"] not in sources:
            yield (
                "evaluate.judge.model",
                (
                    f"'{judge['model']}' is no source here ({', '.join(sources)}"
                    f"{close(judge['model'], sources)}); a judge elsewhere needs an endpoint"
                ),
            )
    limit = evaluate.get("limit")
    for suite, count in limit.items() if isinstance(limit, dict) else ():
        if suite not in suites:
            known = ", ".join(map(str, suites))
            yield f"evaluate.limit.{suite}", f"not among evaluate.suites: {known}"
        elif isinstance(count, int) and count < 1:
            yield f"evaluate.limit.{suite}", f"{count} is not right; should be at least 1"
    if isinstance(limit, int) and limit < 1:
        yield "evaluate.limit", f"{limit} is not right; should be at least 1"
    margin = evaluate.get("margin")
    named = margin if isinstance(margin, dict) else {"": margin}
    for suite, value in named.items():
        where = f"evaluate.margin.{suite}".rstrip(".")
        if suite and suite not in suites:
            yield where, f"not among evaluate.suites: {', '.join(map(str, suites))}"
        elif isinstance(value, (int, float)) and not value > 0:
            yield where, f"{value} is not right; should be greater than 0"
    if evaluate.get("backend") == "vllm" and _mapping(raw, "machine").get("shards", 1) != 1:
        yield "machine.shards", "backend vllm runs in one process only: 1"
    if evaluate.get("backend") == "vllm":
        for name, kind, _ in _variants(raw):
            if kind == "repeat":
                what = "backend vllm forms its batches itself, so that none is of half the size"
                yield f"variants.{name}.repeat", f"{what}; leave it out, or use kfuse or hf"


def close(word: Any, known: Sequence[str]) -> str:
    """The nearest known word in brackets, if one is near; a key may be no word."""
    kinds = [name for name in known if name.startswith(f"{word}@")]
    match = kinds or difflib.get_close_matches(str(word), known, n=1)
    return f" ({' or '.join(match)}?)" if match else ""


def not_right(error: Any, description: str | None = None) -> str:
    """What a value that pydantic refuses is, and what it should be, in a recipe's words.

    description: of the field, for values that are described better than by a pattern.
    """
    kind, found = error["type"], error["input"]
    if kind == "too_short":
        return f"is empty; should have at least {error['ctx']['min_length']} item"
    if kind == "too_long":
        return f"has {len(found)} items; should have {error['ctx']['max_length']}"
    if kind == "invalid_key" or error["loc"][-1] == "[key]":
        return f"YAML reads this key as {found} ({type(found).__name__}); put it in quotes"
    plain = isinstance(found, (str, int, float, bool, type(None)))
    shown = repr(found) if plain else str(found)
    shown = "a mapping" if isinstance(found, dict) else shown
    shown = "a list" if isinstance(found, list) else shown
    message = error["msg"].removeprefix("Input should be ")
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        message = "a mapping"
    elif kind in ("list_type", "tuple_type"):
        message = "a list"
    elif kind == "string_pattern_mismatch" and description:
        message = description
    return f"{shown} is not right; should be {message}"
