"""Read a recipe strictly: one YAML, no inheritance, all mistakes in one message.

Each problem has the path in the file, what was found, what is allowed and a close match. Overrides
(`variants.fused.train.fuse.clm_weight=0.8`) go through the same door. Names that other rooms give
meaning to (fusion functions, merge methods, ensemble rules, suites) are checked here, too.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError

from fusion.errors import RecipeError
from fusion.mergekit import references as models_of
from fusion.spec import SHAPES, Corpus, Dtype, Machine, Section, Source, Variant, operational
from harness.checks import (
    budgets,
    close,
    kept,
    names,
    not_right,
    processes,
    references,
    statistics,
    suites,
    tiny,
)
from harness.methods import methods

BUNDLED = Path(__file__).parent / "recipes"


class Judge(Section):
    """The model that grades conversations: behind an endpoint, or a source of the recipe."""

    model: str = Field(description="its name at the endpoint; without one a source of this recipe")
    endpoint: str | None = Field(
        None, description="an OpenAI-compatible API, as http://HOST:PORT/v1", pattern=r"^https?://"
    )
    key_env: str | None = operational(None, "environment variable that holds the API's key")
    temperature: float = Field(0.0, description="of the judge", ge=0)
    max_tokens: int = Field(1024, description="tokens of a verdict at most", ge=1)
    again: float = operational(
        0.1, "share of verdicts that are asked for twice, to see its noise", ge=0, le=1
    )
    at_once: int = operational(8, "requests under way together", ge=1)


class Evaluate(Section):
    """What is measured, and on how much of it."""

    suites: list[str] = Field(description="suite names, or lm_eval:TASK", min_length=1)
    limit: int | dict[str, int] | None = Field(
        None, description="questions a suite (or by suite): a seeded sample, stratified by task"
    )
    margin: float | dict[str, float] | None = operational(
        None,
        "a gain whose whole interval is within ±margin is called equivalent; a fraction (0.01 is a "
        "point) or bits, one for all suites or by suite",
    )
    dtype: Dtype = Field("float32", description="of the models when they are measured")
    backend: Literal["kfuse", "hf", "vllm"] = Field(
        "kfuse", description="what scores models: our own, or lm-eval's; ensembles are always ours"
    )
    data: str | None = operational(
        None, "folder with the questions; what they hold counts, not where they lie"
    )
    allow_code_execution: bool = Field(
        False, description="let generated programs run in the sandbox"
    )
    judge: Judge | None = Field(None, description="who grades conversations")
    sandbox: str | None = operational(
        None,
        "namespace, process or container:IMAGE; else KFUSE_SANDBOX, or the strongest that works",
        pattern=r"^(namespace|process|container:\S+)$",
    )


class Recipe(Section):
    """A complete recipe: named sources, one corpus, variants, what to measure."""

    sources: dict[str, Source] = Field(min_length=1)
    corpus: Corpus | None = None
    variants: dict[str, Variant] = {}
    evaluate: Evaluate
    reference: str = Field(description="the row that gains are against")
    seed: int = Field(17, description="of packing, training, sampling and resampling")
    machine: Machine = Machine()

    @property
    def rows(self) -> list[str]:
        """Sources, then variants, in the file's order."""
        return [*self.sources, *self.variants]

    def margin(self, suite: str) -> float | None:
        """The difference on a suite that does not matter; None if the recipe names none."""
        margin = self.evaluate.margin
        return margin.get(suite) if isinstance(margin, dict) else margin

    def limit(self, suite: str) -> int | None:
        """How many questions of a suite are measured; None is all."""
        limit = self.evaluate.limit
        return limit.get(suite) if isinstance(limit, dict) else limit


@dataclass(frozen=True)
class Loaded:
    """A recipe as read: its name, text, overrides as passed, and content."""

    name: str
    text: str
    overrides: tuple[str, ...]
    recipe: Recipe


class _Loader(yaml.SafeLoader):
    """YAML where 1e-5 is a number and a repeated key is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def bundled() -> list[str]:
    """Names of the recipes that come with kfuse."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def load(reference: str, overrides: Sequence[str] = ()) -> Loaded:
    """The recipe in a file, or a bundled one by name. RecipeError lists every mistake."""
    path = Path(reference)
    if not path.exists() and (BUNDLED / f"{reference}.yaml").exists():
        path = BUNDLED / f"{reference}.yaml"
    if not path.is_file():
        hint = close(reference, bundled())
        what = "a folder" if path.is_dir() else "no such file, and no recipe of that name"
        raise RecipeError(f"{reference}: {what}; bundled: {', '.join(bundled())}{hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason})") from error
    recipe = parse(text, str(path), overrides)
    return Loaded(path.stem, text, tuple(overrides), recipe)


def parse(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML text; RecipeError lists every mistake with its path."""
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: a recipe is a mapping with keys {', '.join(_keys(Recipe))}")
    problems: list[tuple[str, str]] = []
    for override in overrides:
        _apply(raw, override, problems)
    raw = _expand(raw, problems)
    _read_mergekit(raw, problems)
    recipe = None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems += _shapes(error.errors())
    found = [*names(raw), *references(raw), *budgets(raw), *processes(raw), *methods(raw)]
    found += [*tiny(raw), *statistics(raw), *kept(raw), *suites(raw)]
    known = {path for path, _ in found}
    problems = [*(one for one in problems if one[0] not in known), *found]
    if problems or recipe is None:
        unique = dict.fromkeys(problems)
        width = max(len(path) for path, _ in unique)
        lines = [f"  {path:<{width}}  {message}" for path, message in unique]
        count = f"{len(unique)} problem{'s' * (len(unique) > 1)}"
        raise RecipeError("\n".join([f"{where}: {count}", *lines]))
    return recipe


def _apply(raw: dict, override: str, problems: list[tuple[str, str]]) -> None:
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        problems.append((override, "an override is key.key=value"))
        return
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        problems.append((path, f"'{value}' is not a YAML value"))
        return
    rows = raw.get(keys[0]) if keys[0] in ("sources", "variants") and len(keys) > 1 else None
    if isinstance(rows, dict) and keys[1] not in rows:
        hint = close(keys[1], [str(row) for row in rows])
        problems.append((".".join(keys[:2]), f"no such row to override{hint}"))
        return
    at: Any = raw
    for key in keys[:-1]:
        if isinstance(at, list) and key.isdigit() and int(key) < len(at):
            at = at[int(key)]
        elif isinstance(at, dict):
            if at.get(key) is None:
                at[key] = {}
            at = at[key]
        else:
            problems.append((path, f"'{key}' is not inside a section"))
            return
    if isinstance(at, dict):
        at[keys[-1]] = parsed
    elif isinstance(at, list) and keys[-1].isdigit() and int(keys[-1]) < len(at):
        at[int(keys[-1])] = parsed
    else:
        problems.append((path, f"'{keys[-1]}' is not inside a section"))


def _expand(raw: dict, problems: list[tuple[str, str]]) -> dict:
    """Variants with a `matrix:` become one row for each combination, named by what differs."""
    variants = raw.get("variants")
    if not isinstance(variants, dict):
        return raw
    rows: dict[Any, Any] = {}
    for name, variant in variants.items():
        matrix = variant.get("matrix") if isinstance(variant, dict) else None
        if matrix is None:
            rows[name] = variant
            continue
        where = f"variants.{name}.matrix"
        paths = isinstance(matrix, dict) and all(isinstance(key, str) for key in matrix)
        if not (paths and matrix and all(isinstance(v, list) and v for v in matrix.values())):
            problems.append(
                (where, "a matrix maps a key path of the variant to a list of values, at least one")
            )
            continue
        for values in itertools.product(*matrix.values()):
            row = {k: copy.deepcopy(v) for k, v in variant.items() if k != "matrix"}
            for key, value in zip(matrix, values, strict=True):
                _apply(row, f"{key}={yaml.safe_dump(value, default_flow_style=True)}", problems)
            label = ",".join(
                f"{k.split('.')[-1]}={_said(v)}" for k, v in zip(matrix, values, strict=True)
            )
            if rows.setdefault(f"{name}[{label}]", row) != row:
                problems.append((where, f"unlike values would both be the row {name}[{label}]"))
    return raw | {"variants": rows}


def _said(value: Any) -> str:
    """A value as part of a row's name: lists and mappings by what they hold, joined by +."""
    if isinstance(value, dict):
        value = list(value.values())
    return "+".join(map(_said, value)) if isinstance(value, list) else str(value)


def _read_mergekit(raw: dict, problems: list[tuple[str, str]]) -> None:
    """A merge by a mergekit file gets its content, and the inputs, base and method that it says."""
    variants = raw.get("variants")
    if not isinstance(variants, dict):
        return
    for name, variant in list(variants.items()):
        merge = variant.get("merge") if isinstance(variant, dict) else None
        if not isinstance(merge, dict) or merge.get("mergekit") is None:
            continue
        at = f"variants.{name}.merge"
        for key in ("inputs", "base", "method", "dtype"):
            if key in merge:
                problems.append((f"{at}.{key}", "not beside mergekit, whose configuration says it"))
        parameters = merge.get("parameters")
        for key in parameters if isinstance(parameters, dict) else ():
            if key == "seed":
                continue
            problems.append((f"{at}.parameters.{key}", "belongs into the mergekit configuration"))
        given = merge["mergekit"]
        if isinstance(given, str):
            try:
                given = yaml.load(Path(given).expanduser().read_text(), Loader=_Loader)
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                problems.append((f"{at}.mergekit", f"{given}: cannot be read: {error}"))
                given = {}
        given = given if isinstance(given, dict) else {}
        method, rows, base = given.get("merge_method"), models_of(given), given.get("base_model")
        if not isinstance(method, str) or not rows:
            what = "should be a mergekit configuration: merge_method, and models or slices"
            problems.append((f"{at}.mergekit", what))
        merge = merge | {"mergekit": given, "base": base, "method": f"mergekit:{method}"}
        merge["inputs"] = [row for row in rows if row != base] or rows
        variants[name] = variant | {"merge": merge}


def _keys(model: Any) -> list[str]:
    return list(model.model_fields)


def _model_at(location: Sequence[Any]) -> Any:
    """The Section that a location inside a recipe belongs to, or None."""
    model: Any = Recipe
    for key in location:
        if _is_section(model):
            field = model.model_fields.get(str(key))
            model = field.annotation if field else None
        else:
            arguments = [a for a in get_args(model) if a is not type(None)]
            model = arguments[-1] if arguments else None
        if get_origin(model) in (Union, UnionType):
            shapes = [get_args(a)[0] if get_origin(a) is Annotated else a for a in get_args(model)]
            model = next((a for a in shapes if _is_section(a)), model)
    return model if _is_section(model) else None


def _is_section(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, Section)


def _shapes(errors: Sequence[Any]) -> list[tuple[str, str]]:
    """What is wrong with the file's shape, one line a place; of a value that may be one thing or a
    mapping, what is wrong inside. A row's name that is no text is `names`'.
    """
    said: dict[str, str] = {}
    for error in errors:
        at = error["loc"]
        if at[-1] == "[key]" and at[0] in ("sources", "variants") and len(at) == 3:
            continue
        path, message = _explain(error)
        _, should, other = message.partition("; should be ")
        known = said.get(path, "")
        if should and should in known and not known.endswith(other):
            said[path] = f"{known} or {other}"
        else:
            said.setdefault(path, message)
    return [one for one in said.items() if not any(at.startswith(f"{one[0]}.") for at in said)]


def _explain(error: Any) -> tuple[str, str]:
    location = [part for part in error["loc"] if part not in (*SHAPES, "[key]")]
    path = ".".join(str(part) for part in location)
    kind, found = error["type"], error["input"]
    model = _model_at(location[:-1])
    field = model.model_fields.get(str(location[-1])) if model else None
    if kind == "extra_forbidden":
        allowed = _keys(model) if model else []
        extra = ["matrix"] if model is Variant else []
        hint = close(str(location[-1]), [*allowed, *extra])
        return path, f"unknown key; allowed: {', '.join([*allowed, *extra])}{hint}"
    if kind == "missing":
        return path, f"missing{f': {field.description}' if field and field.description else ''}"
    if kind == "literal_error":
        return path, f"{found!r} is unknown; known: {error['ctx']['expected']}"
    return path, not_right(error, field.description if field else None)


def schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors; `matrix` is expanded before the rest is read."""
    out = Recipe.model_json_schema()
    matrix = {
        "description": "key path inside the variant → list of values; one row for each combination",
        "type": "object",
        "additionalProperties": {"type": "array"},
    }
    out["$defs"]["Variant"]["properties"]["matrix"] = matrix
    fuse = out["$defs"]["Fuse"]
    fuse["required"].remove("function")
    published = {"properties": {"fidelity": {"const": "reference"}}, "required": ["fidelity"]}
    merge = out["$defs"]["Merge"]
    merge["required"] = []
    merge["anyOf"] = [{"required": ["inputs", "method"]}, {"required": ["mergekit"]}]
    merge["properties"]["mergekit"] |= {"anyOf": [{"type": "string"}, {"type": "object"}]}
    fuse["anyOf"] = [{"required": ["function"]}, published]
    return out | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "kfuse recipe",
    }
