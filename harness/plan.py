"""What a recipe comes to: every folder that it needs, in order, and which are there already.

An identity hashes a section's result-changing fields, the identities of what goes in (sources by
content) and the version of the code that gives the output its meaning. Changing λ so renames the
fused row and what depends on it, and nothing else. Planning reads manifests and hashes files; it
loads no model and needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusion.errors import RunError
from fusion.mergekit import made_by
from fusion.spec import Source, Train
from harness import mirror
from harness.assets import PINNED, local_files
from harness.corpus_steps import packed_corpus, statistics
from harness.hashing import TINY_VERSION, corpus_hash, definition_hash, file_hash, folder_hash
from harness.judging import judge_key
from harness.recipe import Recipe
from harness.rules import mixing
from harness.steps import (
    VERSIONS,
    Plan,
    Step,
    model_bytes,
    place,
    planned_step,
    root,
    tokenizer_identity,
)
from harness.store import identity
from tasks.suite import Suite, load_suite

HELDOUT = ("bits_per_byte", "bits_per_byte@fusellm", "response_bits_per_byte")


def plan(recipe: Recipe, home: Path) -> Plan:
    """Every step that the recipe comes to. RunError if a local source is missing."""
    mirror.learn(home)
    out = Plan(recipe, home)
    for name, source in recipe.sources.items():
        _source(out, name, source)
    for name in _in_order(recipe):
        _variant(out, name)
    for name in recipe.rows:
        for suite in recipe.evaluate.suites:
            _evaluation(out, name, suite)
    return out


def _in_order(recipe: Recipe) -> Iterator[str]:
    """Variants so that each comes after its inputs; the file's order otherwise."""
    waiting = list(recipe.variants)
    ready = set(recipe.sources)
    while waiting:
        name = next(n for n in waiting if set(inputs(recipe, n)) <= ready)
        waiting.remove(name)
        ready.add(name)
        yield name


def inputs(recipe: Recipe, name: str) -> list[str]:
    """The rows that a row is made from, directly."""
    if name in recipe.sources:
        return []
    variant = recipe.variants[name]
    if variant.train:
        rows = []
        for train in (variant.train, paid(recipe, variant.train)):
            rows += [train.init, *(train.fuse.sources if train.fuse else [])] if train else []
        return list(dict.fromkeys(rows))
    if variant.merge:
        return [*variant.merge.inputs, *([variant.merge.base] if variant.merge.base else [])]
    if variant.repeat:
        return [variant.repeat.row]
    assert variant.ensemble
    return list(variant.ensemble.members)


def paid(recipe: Recipe, train: Train) -> Train | None:
    """The training whose FLOPs this one comes to, if it has a budget."""
    return recipe.variants[train.budget].train if train.budget else None


def _source(out: Plan, name: str, source: Source) -> None:
    path = source.path
    if path.startswith(("pypi:", "tiny:")) or path.endswith(".gguf"):
        if path.startswith("pypi:"):
            content = {"from": path, "sha256": PINNED.get(path[5:]), "version": VERSIONS["convert"]}
        elif path.startswith("tiny:"):
            content = {"from": path, "version": TINY_VERSION}
        else:
            file = Path(path).expanduser()
            if not file.is_file():
                raise RunError(f"sources.{name}.path: {path} does not exist ({file.absolute()})")
            content = {"sha256": file_hash(out.home, file), "version": VERSIONS["convert"]}
        key = identity(content)
        folder = place(out.home, "models", name, key)
        disk = 0 if path.startswith("tiny:") else 1_100_000_000
        step = Step("fetch", name, folder, key, {"path": path}, rows=(name,), disk=disk)
        folder = out.add(step).folder
    else:
        folder, key = _ready_made(out.home, name, source)
        if not (folder / "config.json").is_file():
            content = {"path": path, "revision": source.revision}
            disk = round(2 * source.parameters) if source.parameters else 0
            step = Step("fetch", name, folder, key, content, rows=(name,), disk=disk)
            folder = out.add(step).folder
    out.identities[name], out.folders[name] = key, folder
    out.summaries[name] = f"source {path}" + (f"@{source.revision}" if source.revision else "")


def _ready_made(home: Path, name: str, source: Source) -> tuple[Path, str]:
    """A local folder, or a hub snapshot: where it is and its content's hash."""
    local = Path(source.path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise RunError(f"sources.{name}.path: {local} holds no config.json: not a model folder")
        return local, folder_hash(home, local)
    if local.is_file() or source.path.startswith((".", "/", "~")) or source.path.count("/") != 1:
        what = "is a file of another kind" if local.is_file() else "does not exist"
        raise RunError(
            f"sources.{name}.path: {source.path} {what} ({local.absolute()}); give a hub "
            "id (owner/name), a local folder, a .gguf file or pypi:PACKAGE==VERSION"
        )
    snapshot = hub_snapshot(source)
    if snapshot:
        return snapshot, folder_hash(home, snapshot)
    return home / "absent" / source.path, identity({"hub": source.path, "at": source.revision})


def hub_snapshot(source: Source) -> Path | None:
    """The local copy of a hub model, if there is one; the network is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(
            snapshot_download(source.path, revision=source.revision, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    return found if (found / "config.json").is_file() else None


def _variant(out: Plan, name: str) -> None:
    variant = out.recipe.variants[name]
    if variant.train:
        _train(out, name, variant.train)
    elif variant.merge:
        merge = variant.merge
        content = merge.results() | {
            "inputs": [out.identities[i] for i in merge.inputs],
            "base": out.identities[merge.base] if merge.base else None,
            "version": VERSIONS["merge"],
            **made_by(merge.method),
        }
        collected = [step.identity for step in statistics(out, name, merge)]
        content |= {"statistics": collected} if collected else {}
        key = identity({"merge": content})
        folder = place(out.home, "models", name, key)
        needs = (*(out.identities[i] for i in inputs(out.recipe, name)), *collected)
        step = out.add(
            Step("merge", name, folder, key, content, needs, (name,), disk=model_bytes(out, name))
        )
        out.identities[name], out.folders[name] = key, step.folder
        out.summaries[name] = f"{merge.method} merge of {', '.join(merge.inputs)}"
    elif variant.repeat:
        row = variant.repeat.row
        out.identities[name], out.folders[name] = identity({"repeat": out.identities[row]}), None
        out.summaries[name] = f"{row} once more, in batches of half the size"
    elif variant.ensemble:
        ensemble = variant.ensemble
        members = [out.identities[m] for m in ensemble.members]
        mixed = str(mixing(ensemble.rule, ensemble.level))
        content = {"members": members, "mixing": mixed, "version": VERSIONS["evaluate"]}
        content = ensemble.results() | content
        out.identities[name], out.folders[name] = identity({"ensemble": content}), None
        for member in ensemble.members[1:]:
            _map_step(out, name, member, ensemble.members[0], "prefix")
        out.summaries[name] = f"{ensemble.rule} ensemble of {', '.join(ensemble.members)}; {mixed}"


def _train(out: Plan, name: str, train: Train) -> None:
    recipe, home = out.recipe, out.home
    corpus = recipe.corpus
    assert corpus
    init = out.identities[train.init]
    seed = recipe.seed if train.seed is None else train.seed
    packed = packed_corpus(out, name, train.init, train.domains)
    content: dict[str, Any] = train.results() | {
        "init": init,
        "corpus": packed.identity,
        "packing": corpus.packing,
        "seed": seed,
        "version": VERSIONS["train"],
    }
    if seed != recipe.seed:
        content["order"] = "drawn"  # by the seed; the recipe's has packed the blocks already
    # The corpus' identity says the domains; a budget is what it counts, not the row's name.
    del content["domains"], content["budget"]
    if train.lora is None:
        del content["lora"]
    needs = [init, packed.identity]
    summary = f"{train.init} trained on {', '.join(train.domains or ['the corpus'])}"
    rival = paid(recipe, train)
    if rival:
        content["budget"] = _budget(out, name, rival)
        needs += [content["budget"]["init"], content["budget"]["corpus"]]
        needs += content["budget"]["sources"]
        summary += f" for as many FLOPs as {train.budget}"
    if train.fuse:
        from fusion.vocabulary import needs_counts

        fuse = train.fuse
        captures, maps = [], []
        for source in fuse.sources:
            captured = {
                "source": out.identities[source],
                "corpus": packed.identity,
                "top_k": fuse.top_k,
                "dtype": train.dtype,
                "version": VERSIONS["capture"],
            }
            captured |= {"template": "pivot"} if fuse.template == "pivot" else {}
            step = planned_step(
                out,
                "capture",
                source,
                captured,
                (out.identities[source], packed.identity),
                name,
                row=source,
                tokens=corpus.tokens,
                disk=corpus.tokens * (10 + 4 * fuse.top_k),
            )
            captures.append(step if fuse.online else out.add(step))
            counted = None
            if needs_counts(fuse.vocabulary):
                counted = {"corpus": packed.identity, "alignment": fuse.alignment}
                counted |= {"template": "pivot"} if fuse.template == "pivot" else {}
            maps.append(_map_step(out, name, source, train.init, fuse.vocabulary, counted))
        content["fuse"] = fuse.results() | {
            "sources": [c.identity for c in captures],
            "maps": [m.identity for m in maps],
        }
        needs += [step.identity for step in maps]
        needs += [out.identities[source] for source in fuse.sources]
        needs += [] if fuse.online else [step.identity for step in captures]
        summary = f"{fuse.function} fusion of {', '.join(fuse.sources)} into {train.init}"
        weight = fuse.weight_at
        summary += f", λ = {weight.start:g}"
        summary += f" to {weight.end:g}" if weight.end != weight.start else ""
    summary += f", by adapters of rank {train.lora.rank}" if train.lora else ""
    key = identity({"train": content})
    folder = place(home, "models", name, key)
    tokens = corpus.tokens * train.epochs
    disk = model_bytes(out, name)
    made = out.add(Step("train", name, folder, key, content, tuple(needs), (name,), tokens, disk))
    out.identities[name], out.folders[name] = key, made.folder
    out.summaries[name] = summary


def _budget(out: Plan, name: str, rival: Train) -> dict[str, Any]:
    """What decides another row's FLOPs; λ and whatever else costs nothing stays out."""
    sources = rival.fuse.sources if rival.fuse else []
    return {
        "init": tokenizer_identity(out, rival.init),
        "corpus": packed_corpus(out, name, rival.init, rival.domains).identity,
        "epochs": rival.epochs,
        "sources": [tokenizer_identity(out, source) for source in sources],
        "version": VERSIONS["budget"],
    } | ({"lora": rival.lora.results()} if rival.lora else {})


def _map_step(
    out: Plan,
    name: str,
    source: str,
    target: str,
    method: str,
    counted: dict[str, str] | None = None,
) -> Step:
    """The map from one row's vocabulary to another's; it belongs to their tokenizers.

    counted: the corpus and the alignment whose pairs it is made from, if it is.
    """
    roots = root(out.recipe, source), root(out.recipe, target)
    content = {
        "source": out.identities[roots[0]],
        "target": out.identities[roots[1]],
        "method": method,
        "version": VERSIONS["map"],
    } | (counted or {})
    corpus = [counted["corpus"]] if counted else []
    needs = (out.identities[roots[0]], out.identities[roots[1]], *corpus)
    step = planned_step(out, "map", f"{roots[0]}-to-{roots[1]}", content, needs, name)
    step.content.update(source_row=roots[0], target_row=roots[1])
    return out.add(step)


def suite_of(name: str) -> Suite | None:
    """The suite of that name; None for a stock task, which lm-eval defines."""
    return None if name.startswith("lm_eval:") else load_suite(name)


def _evaluation(out: Plan, row: str, suite: str) -> None:
    recipe = out.recipe
    content: dict[str, Any] = {
        "model": out.identities[row],
        "suite": suite,
        "definition": definition_hash(suite),
        "limit": recipe.limit(suite),
        "seed": recipe.seed,
        "dtype": recipe.evaluate.dtype,
        "version": VERSIONS["evaluate"],
    }
    variant = recipe.variants.get(row)
    if recipe.evaluate.backend != "kfuse" and not (variant and variant.ensemble):
        content["backend"] = recipe.evaluate.backend
    known = suite_of(suite)
    if known and known.executes_code:
        content["allow_code_execution"] = recipe.evaluate.allow_code_execution
    if known and recipe.evaluate.data:
        local = Path(recipe.evaluate.data).expanduser()
        read = {str(p): file_hash(out.home, local / p) for p in local_files(known.datasets, local)}
        content |= {"data": read} if read else {}
    if suite in HELDOUT and recipe.corpus and recipe.corpus.heldout:
        content["heldout"] = corpus_hash(out.home, recipe.corpus.heldout, "heldout")
    key = identity({"evaluate": content})
    folder = place(out.home, "evaluations", f"{row}-{suite.replace(':', '_')}", key)
    needs = (out.identities[row],)
    judge = judge_key(out) if known and known.judged else None
    out.add(Step("evaluate", suite, folder, key, content, needs, (row,), judge=judge))


__all__ = [
    "Plan",
    "Step",
    "hub_snapshot",
    "inputs",
    "paid",
    "plan",
    "suite_of",
    "tokenizer_identity",
]
