"""Rows whose weights are kept as a difference from another row's, and getting them back.

A row is measured as it was trained or merged; only then is it compressed, and its manifest says
under `kept` what that took and what it costs in bits per byte, by what comes back. An exact
difference gives the same weights when another row asks for them. A row that was kept with a loss
is not asked for silently: `kfuse restore` writes it to a folder, which is another model.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion.errors import RunError
from harness import mirror
from harness.locks import owned, require
from harness.machine import device
from harness.plan import Plan, Step
from harness.progress import lives, say, signs
from harness.store import read_manifest, require_space, world, write_json

TEXTS, CHARACTERS = 24, 2000  # what a loss is measured on: so many documents, so much of each


def keep_rows(plan: Plan, rows: Sequence[str]) -> dict[str, str]:
    """Compress rows that are made, measured, and needed by nothing; reasons for what could not."""
    reasons = {}
    for row in rows:
        step, keep = plan.steps[plan.identities[row]], plan.recipe.variants[row].keep
        assert keep
        try:
            with owned(plan.home, step.folder.name):  # another process may be at it
                mirror.bring(step.folder)
                _keep(plan, row, step, keep.bits)
                mirror.send(step.folder)
        except (RunError, OSError) as error:
            reasons[row] = str(world(error, step.folder) if isinstance(error, OSError) else error)
    for row in rows:  # last: until here, all of it is there, also what another row is kept from
        folder = plan.steps[plan.identities[row]].folder
        if row not in reasons and not _read_by_others(plan.home, row, folder):
            with owned(plan.home, folder.name):
                mirror.bring(folder)
                for path in _weights(folder):
                    path.unlink()
                mirror.send(folder)
    return reasons


def _read_by_others(home: Path, row: str, folder: Path) -> bool:
    """Whether work of another recipe stands on a row's weights just now, which is then said."""
    readers = [s for s in signs(home) if folder.name in s.get("reads", ()) and lives(s)]
    for sign in readers:
        say(
            f"{row}: its weights stay, {sign['folder']} is being made from them (process "
            f"{sign['pid']} on {sign['host']}); the next run removes them"
        )
    return bool(readers)


def _keep(plan: Plan, row: str, step: Step, bits: float | str) -> None:
    from fusion.deltas import whole

    manifest = read_manifest(step.folder) or {}
    kept = manifest.get("kept")
    if kept and kept["bits"] != bits:
        weights_again(plan.home, row, step.folder, lossy=True)
        if not whole(step.folder):
            say(f"{row}: is kept at {kept['bits']} bits already; the recipe's {bits} is too late")
            return
        del manifest["kept"]  # its delta is about to be another
        write_json(step.folder / "manifest.json", manifest)
        kept = None
    if not kept:
        manifest["kept"] = _compressed(plan, row, step.folder, bits)
        require(plan.home, step.folder.name)
        write_json(step.folder / "manifest.json", manifest)
        say(f"{row}: {told(manifest['kept'])}")


def told(kept: Mapping[str, Any]) -> str:
    """What a row is kept as, in a line."""
    before, after = kept["bytes_before"], kept["bytes"]
    lost = kept["bits_per_byte_lost"]
    share = f"{before / 1e6:.1f} MB in {after / 1e6:.1f} MB (1/{before / max(1, after):.1f})"
    if kept["bits"] == "exact":
        return f"kept as its exact difference from {kept['from']}: {share}"
    loss = "loss not measured" if lost is None else f"{lost:+.5f} bits per byte"
    how = f"{kept['bits']:g} bits an element"
    return f"kept as its difference from {kept['from']}, {how}: {share}, {loss}"


def _compressed(plan: Plan, row: str, folder: Path, bits: float | str) -> dict[str, Any]:
    from fusion.deltas import compress, restore
    from harness.model_folder import model_folder

    source = plan.recipe.variants[row].kept_from
    assert source
    base = model_folder(plan, source)
    if folder in _grounds(plan.home, base):
        raise RunError(
            f"{row}: {source} is itself kept as its difference from {row}, so that neither would "
            "come back; give keep.base another row"
        )
    require_space(folder, sum(p.stat().st_size for p in _weights(folder)) * 2, f"keeping {row}")
    facts = compress(folder, base, folder, bits)
    with _alone(plan.home, folder) as restored:
        facts = restore(folder, base, restored)
        texts = _texts(plan)
        measured: list[float] = []
        if texts and bits != "exact":
            measured = [bits_per_byte(plan, each, texts) for each in (folder, restored)]
    inside = base.is_relative_to(plan.home)
    return facts | {
        "from": source,
        "base_folder": str(base.relative_to(plan.home) if inside else base),
        "bits_per_byte": measured,
        "bits_per_byte_lost": measured[1] - measured[0] if measured else None,
        "texts": len(texts),
    }


def _texts(plan: Plan) -> list[str]:
    """The beginnings of held-out documents; without any, of the corpus's that are in no block."""
    from fusion.corpus import Content, of_domains, plain, read_blocks, read_documents
    from harness.corpora import corpus_path

    corpus = plan.recipe.corpus
    if corpus is None:
        return []
    used: set[tuple[str, Content]] = set()
    path = Path(corpus.heldout).expanduser() if corpus.heldout else corpus_path(plan, corpus.path)
    documents = read_documents(path)
    if not corpus.heldout:
        for step in plan.steps.values():
            if step.kind == "pack" and step.done:
                mirror.bring(step.folder)
                domains = step.content.get("domains")  # a piece's number is one among theirs
                own = of_domains(documents, domains) if domains else documents
                blocks = read_blocks(step.folder / "blocks.parquet")
                used |= {own[piece.document] for block in blocks for piece in block}
    texts = [plain(document[1]) for document in documents if document not in used]
    every = max(1, len(texts) // TEXTS)
    return [text[:CHARACTERS] for text in texts[::every][:TEXTS] if len(text) > 1]


def bits_per_byte(plan: Plan, folder: Path, texts: Sequence[str]) -> float:
    """−Σ log₂ p over the bytes of texts, of a model folder, each text by itself."""
    import torch

    from fusion.models import (
        begins_with_bos,
        causal_pattern,
        hidden_states,
        load_model,
        load_tokenizer,
        token_logprobs,
    )
    from fusion.tokens import tokenize

    model, tokenizer = load_model(folder, device=device(plan)), load_tokenizer(folder)
    bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    nats, count = [], 0
    for text in texts:
        tokens = tokenize(tokenizer, text)
        ids = torch.tensor([[*bos, *tokens.ids.tolist()]], device=model.device)
        ones = torch.ones_like(ids)
        pattern = causal_pattern(ones, ones.bool())
        with torch.inference_mode():
            hidden = hidden_states(model, ids, ones.cumsum(1) - 1, pattern)[0, :-1]
            nats += (-token_logprobs(model, hidden, ids[0, 1:])[0]).double().tolist()
        count += int(tokens.ends[-1]) - (0 if bos else int(tokens.ends[0]))
    return math.fsum(nats) / math.log(2) / max(1, count)


def _weights(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.safetensors.index.json"))]


@contextmanager
def _alone(home: Path, folder: Path) -> Iterator[Path]:
    """A hidden folder beside one, gone afterwards, while no other process changes its weights."""
    hidden = folder.with_name(f".{folder.name}.restored")
    with owned(home, f"{folder.name}.weights"):
        shutil.rmtree(hidden, ignore_errors=True)  # of a process that was ended
        try:
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def weights_again(
    home: Path, row: str, folder: Path, lossy: bool = False, above: tuple[Path, ...] = ()
) -> None:
    """Put a kept row's weights back into its folder, if they are not there.

    RunError if the row was kept with a loss, for then they would not be the row's; with `lossy`,
    nothing happens. above: the folders that are to come back from this one.
    """
    from fusion.deltas import restore, whole

    kept = (read_manifest(folder) or {}).get("kept")
    if not kept or whole(folder):
        return
    if kept["bits"] != "exact":
        if lossy:
            return
        raise RunError(
            f"{row}: its weights are kept at {kept['bits']} bits an element only, which is another "
            f"model: write it with `kfuse restore {folder.name} --to DIR` and name DIR as a "
            f"source, or delete {folder} to make the row again"
        )
    base = _base(home, kept, (*above, folder))
    with _alone(home, folder) as restored:
        if whole(folder):  # another process was faster
            return
        restore(folder, base, restored)
        for path in _weights(folder):  # of a move that was interrupted
            path.unlink()
        for path in _weights(restored):
            path.replace(folder / path.name)


def _base(home: Path, kept: Mapping[str, Any], above: tuple[Path, ...] = ()) -> Path:
    """The folder that a delta was taken from, with its weights, which may be kept themselves."""
    folder = home / kept["base_folder"]
    mirror.bring(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: the base that the delta was taken from is not there")
    if folder in above:
        raise RunError(f"{folder}: is kept as a difference from itself; build the row again")
    weights_again(home, folder.name, folder, above=above)
    return folder


def _grounds(home: Path, folder: Path) -> list[Path]:
    """A folder, the one that it is kept as a difference from, the one that this is, and so on."""
    out: list[Path] = []
    while folder not in out:
        out.append(folder)
        kept = (read_manifest(folder) or {}).get("kept")
        folder = home / kept["base_folder"] if kept else folder
    return out


def restore_to(home: Path, name: str, to: Path, base: Path | None = None) -> str:
    """Write the model that a folder, or one of that name in the store, keeps; a line about it."""
    from fusion.deltas import restore

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to}: is there already; name a folder that is new or empty")
    folder = Path(name)
    mirror.bring(folder.absolute())
    if not folder.is_dir():
        mirror.learn(home)
        for path in home.glob(f"models/{name}*"):
            mirror.bring(path)
        found = sorted(p for p in home.glob(f"models/{name}*") if (p / "delta.json").exists())
        if len(found) != 1:
            listed = sorted(p.parent.name for p in home.glob("models/*/delta.json"))
            raise RunError(
                f"{name}: {len(found) or 'no'} kept models of that name in {home}; kept: "
                f"{', '.join(listed) or 'none'}"
            )
        folder = found[0]
    if base is None:
        kept = (read_manifest(folder) or {}).get("kept")
        if not kept:
            raise RunError(f"{folder}: its manifest names no base; give it with --base")
        base = _base(home, kept)
    facts = restore(folder, base, to)
    same = "the same model" if facts["restored"] == facts["model"] else "another model than before"
    return f"{to}: {same}, content {facts['restored'][:8]}, from {folder}"
