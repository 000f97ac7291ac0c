"""Put the requests of items to a model, and what a record keeps of its answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fusion.conversations import CHAT, asking, said_in
from fusion.errors import RunError
from harness.generation import Generation
from harness.rolling import roll
from harness.scoring import Instance

if TYPE_CHECKING:
    from harness.evaluate import Item

_UNABLE = (
    "an ensemble answers conversations in its own words and scores no given answers to them: its "
    "members' templates write unlike text in front"
)
_UNTOLD = (
    "conversations are put to models by kfuse's own backend; lm-eval's are not told of their "
    "templates"
)


def ask(lm: Any, items: Sequence[Item]) -> Iterator[tuple[Item, list]]:
    """What the model says to each item: a response a request, or `repeats` of them generated."""
    kind = items[0].requests[0].request_type
    asked = [[r for r in item.requests for _ in range(times(r))] for item in items]
    requests = [request for some in asked for request in some]
    able = getattr(lm, "chats", ())
    if kind not in able and any(map(_converses, requests)):
        raise RunError(_UNABLE if able else _UNTOLD)
    if "turns" in items[0].doc:
        yield from _talk(lm, items)
        return
    if kind == "generate_until":
        answers: list[Any] = lm.generate(requests)
    elif kind == "loglikelihood_rolling":
        answers = roll(lm, requests)
    else:
        answers = lm.loglikelihood(requests, disable_tqdm=True)
    each = iter(answers)
    for item, some in zip(items, asked, strict=True):
        yield item, [next(each) for _ in some]


def _converses(request: Instance) -> bool:
    return str(request.args[0]).startswith(CHAT)


def read_as(lm: Any, items: Sequence[Item]) -> tuple[dict[str, str], list[str]]:
    """How a model reads these items' prompts, for its engine, and what a report should say of it.

    Nothing where they are no conversations, or none that a model without a template could read.
    """
    prompts = [str(item.requests[0].args[0]) for item in items if _converses(item.requests[0])]
    if not prompts or said_in(prompts[0])[1] is None:
        return {}, []
    members = getattr(lm, "members", [lm])
    plain = [not member.reads(prompts[0])[1] for member in members]
    if not any(plain):
        return {"asked": "chat"}, []
    if all(plain):
        return {"asked": "plain"}, ["it has no chat template: asked the plain prompt"]
    which = ", ".join(str(number) for number, one in enumerate(plain, 1) if one)
    note = f"of its members, number {which} has no chat template and reads the plain prompt"
    return {"asked": "chat and plain"}, [note]


def _talk(lm: Any, items: Sequence[Item]) -> Iterator[tuple[Item, list]]:
    """Conversations of several turns: the model's own answers stand before what is asked next."""
    said: list[list[Generation]] = [[] for _ in items]
    for turn in range(max(len(item.doc["turns"]) for item in items)):
        going = [at for at, item in enumerate(items) if turn < len(item.doc["turns"])]
        requests = []
        for at in going:
            (request,) = items[at].requests
            messages = [(role, content) for role, content in items[at].doc["messages"]]
            for answer, asked in zip(said[at], items[at].doc["turns"][1 : turn + 1], strict=True):
                messages += [("assistant", answer.text), ("user", asked)]
            requests.append(replace(request, arguments=(asking(messages), *request.args[1:])))
        for at, answer in zip(going, lm.generate(requests), strict=True):
            said[at].append(answer)
    yield from zip(items, said, strict=True)


def times(request: Instance) -> int:
    """How often a request is put: a log-likelihood does not change when it is asked again."""
    return int(request.repeats or 1) if request.request_type == "generate_until" else 1


def record(item: Item, answers: list) -> dict[str, Any]:
    kind = item.requests[0].request_type
    generated = kind == "generate_until"
    rolling = kind == "loglikelihood_rolling"
    choices = [] if generated or rolling else [str(r.args[1]) for r in item.requests]
    return {
        "task": item.task,
        "doc_id": item.doc_id,
        "doc_hash": item.hashes[0],
        "prompt_hash": item.hashes[1],
        "cluster": str(item.doc.get("cluster", item.doc_id)),
        "gold": json.dumps(item.doc.get("gold", item.doc.get("target")), default=str),
        "output_type": kind,
        "choice_ll": [a.logprob if rolling else float(a[0]) for a in answers if not generated],
        "choice_greedy": [] if generated or rolling else [bool(a[1]) for a in answers],
        "choice_bytes": [len(c.encode()) for c in choices],
        "choice_chars": [len(c) for c in choices],
        "text_bytes": len(item.prompt.encode()) if rolling else 0,
        "text_tokens": answers[0].tokens if rolling else 0,
        "generation": [a.text for a in answers] if generated else [],
        "finish_reason": [a.finish_reason for a in answers] if generated else [],
        "generated_tokens": sum(a.tokens for a in answers) if generated else 0,
    }
