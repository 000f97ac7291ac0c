"""What every row was asked, kept once for each protocol, for reports that open no benchmark.

Records hold hashes of questions and prompts; the texts lie in `data/prompts-PROTOCOL.parquet`. A
protocol hashes every prompt, so that a file of its name can only be right or damaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.conversations import CHAT, said_in
from fusion.errors import RunError
from harness import mirror
from harness.plan import Plan, Step
from harness.progress import say
from harness.store import beside, read_manifest, world

if TYPE_CHECKING:
    from harness.evaluate import Item, Loaded


def prompts(plan: Plan, steps: Sequence[Step]) -> dict[str, Path]:
    """The files of one suite's finished measurements by protocol; made where there is none yet.

    What cannot be had any more (questions that are gone, a definition that changed) is left out.
    """
    found: dict[str, Path] = {}
    loaded: Loaded | None = None
    for step in steps:
        protocol = (read_manifest(step.folder) or {}).get("protocol")
        if not protocol or protocol in found:
            continue
        path = plan.home / "data" / f"prompts-{protocol}.parquet"
        if not path.exists():
            mirror.bring(path)
        if not path.exists():
            try:
                loaded = loaded or _load(plan, step)
            except RunError as error:
                say(f"{step.name}: the report goes without its prompts ({error})")
                return found
            if loaded.protocol != protocol:
                say(f"{step.name}: measured by another protocol; the report lacks those prompts")
                continue
            _write(path, loaded)
            mirror.send(path)
        found[protocol] = path
    return found


def _load(plan: Plan, step: Step) -> Loaded:
    from harness.measuring import Measuring

    return Measuring(plan).suite(step)


def _write(path: Path, loaded: Loaded) -> None:
    import pandas as pd

    rows = [
        {
            "task": item.task,
            "doc_id": item.doc_id,
            "prompt": asked(item),
            "question": question(item, loaded.tasks[item.task]),
        }
        for item in loaded.items
    ]
    partial = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)

        pd.DataFrame(rows).to_parquet(partial, index=False, compression="zstd")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise world(error, path) from error


def asked(item: Item) -> str:
    """The prompt as the model gets it, and below it the choices that are scored, numbered."""
    if item.requests[0].request_type != "loglikelihood":
        return _said(item.prompt)
    pairs = [(_said(str(r.args[0])), str(r.args[1])) for r in item.requests]
    if len({context for context, _ in pairs}) > 1:  # each choice has a context of its own
        return "\n".join(f"[{i}] {context}{text}" for i, (context, text) in enumerate(pairs))
    choices = "\n".join(f"[{i}]{text}" for i, (_, text) in enumerate(pairs))
    return f"{_said(item.prompt)}\n\n{choices}"


def _said(prompt: str) -> str:
    """A prompt to look at; of a conversation who says what."""
    if not prompt.startswith(CHAT):
        return prompt
    return "\n\n".join(f"{role}: {content}" for role, content in said_in(prompt)[0])


def question(item: Item, task: Any) -> str:
    """What is the item's own in its prompt (no shots, no instruction), and all its choices."""
    if item.requests[0].request_type == "loglikelihood_rolling":
        return item.prompt
    text = task.doc_to_text(item.doc)
    own = text if isinstance(text, str) else item.prompt
    if item.requests[0].request_type == "generate_until":
        return own
    return " ".join([own, *dict.fromkeys(str(request.args[1]) for request in item.requests)])
