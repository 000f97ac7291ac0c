"""Another model's verdicts on what rows answered: ratings, or preferences over a reference answer.

A function of records and questions that needs no row's model. Every verdict is kept by judge and
prompt, whole or not at all, so that a measurement that is interrupted, repeated or judged by others
asks for nothing twice. A share is asked for twice: how far a judge agrees with itself is part of
what its numbers mean. A verdict that cannot be read is no verdict: never 0, and never a tie.

Relative to MT-Bench and AlpacaEval (2306.05685, 2404.04475): the same questions, grades and both
turns; the judge's instructions are our own words, and a preference is asked for in both orders.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import mirror
from harness.judges import Ask
from harness.progress import bar
from harness.recipe import Judge
from harness.store import identity, write_json

if TYPE_CHECKING:
    from harness.steps import Plan

VERSION = 1  # raise when prompts or the reading of verdicts change

_RATE = """Grade the last answer of an assistant in the conversation below.
Look at whether it is right, helpful, relevant, complete and as long as it should be. {extra}
First say in a few sentences what is good and what is not. Then end with one line
Rating: N
where N is a whole number from 1 (useless) to 10 (could not be better).

{conversation}"""
_REFERENCE = "\n\n[A right answer to the last question]\n{reference}\n[End of the right answer]"
_PREFER = """Two assistants answered the same request. Decide which answer serves the person better.
Look at whether it is right, helpful, relevant and complete; neither length nor order counts.
First compare them in a few sentences. Then end with one line
Better: A
or
Better: B
or, only if there is nothing between them,
Better: none

[Request]
{request}
[End of the request]

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]"""
_RATING = re.compile(r"rating\W{0,6}(\d+(?:\.\d+)?)", re.IGNORECASE)
_BETTER = re.compile(r"better\W{0,6}(A|B|none)\b", re.IGNORECASE)


@dataclass
class Verdicts:
    """What a judge said: rows of scores by item, and what is to be known of it."""

    rows: dict[tuple[str, int], list[dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def judge_key(plan: Plan) -> str | None:
    """What decides a judge's verdicts, hashed; None without a judge."""
    section = plan.recipe.evaluate.judge
    if section is None:
        return None
    row = None if section.endpoint else plan.identities[section.model]
    return identity({"judge": section.results(), "version": VERSION, "row": row})


def rating_prompts(doc: Mapping[str, Any], answers: Sequence[str]) -> Iterator[str]:
    """What a judge is asked of a conversation, once for each of its turns."""
    turns, references = doc["turns"], doc.get("reference") or []
    for turn in range(len(answers)):
        said = []
        for question, answer in zip(turns[: turn + 1], answers, strict=False):
            said += [f"[Person]\n{question}", f"[Assistant]\n{answer}"]
        text = "\n\n".join(said)
        extra = ""
        if turn < len(references) and references[turn]:
            extra = "A right answer is given at the end; compare with it."
            text += _REFERENCE.format(reference=references[turn])
        yield _RATE.format(extra=extra, conversation=text)


def preference_prompts(doc: Mapping[str, Any], answer: str) -> tuple[str, str]:
    """What a judge is asked of an answer and the reference's: the answer first, then second."""
    said = {"request": doc["turns"][0]}
    other = doc["reference"][0]
    return (
        _PREFER.format(**said, first=answer, second=other),
        _PREFER.format(**said, first=other, second=answer),
    )


def read_rating(text: str) -> float | None:
    """The grade that a verdict ends with, 1 to 10; None if it has none."""
    found = _RATING.findall(text)
    grade = float(found[-1]) if found else 0.0
    return grade if 1 <= grade <= 10 else None


def read_preference(text: str, first: bool) -> float | None:
    """1 if the answer is preferred, 0 if the other is, ½ for neither; None if it is not said."""
    found = _BETTER.findall(text)
    if not found:
        return None
    if found[-1].lower() == "none":
        return 0.5
    return float((found[-1].upper() == "A") == first)


def judge(
    kind: str,
    section: Judge,
    key: str,
    records: Sequence[tuple[tuple[str, int], Mapping[str, Any], Sequence[str]]],
    ask: Ask,
    home: Path,
    label: str = "verdicts",
) -> Verdicts:
    """Scores of items (key, document, answers). kind: rating or preference.

    key: who judges (`judge_key`). ask: how the judge is reached. RunError if it cannot be; what it
    said before is kept.
    """
    asked: dict[tuple[str, int], list[str]] = {}
    for item, doc, answers in records:
        pair = preference_prompts(doc, answers[0]) if kind == "preference" else None
        asked[item] = list(pair or rating_prompts(doc, answers))
    prompts = list(dict.fromkeys(p for some in asked.values() for p in some))
    twice = [p for p in prompts if _share(p) < section.again]
    wanted = [(p, 0) for p in prompts] + [(p, 1) for p in twice]
    at_once = section.at_once if section.endpoint else 1
    folder = home / "judgements" / key[:16]
    mirror.bring(folder)
    with bar(label, len(wanted)) as progress, mirror.sending(folder):
        said = _said(wanted, ask, folder, at_once, progress)
    out = Verdicts()
    read = _reader(kind)
    for item, doc, answers in records:
        values = [read(said[p, 0]["text"], n) for n, p in enumerate(asked[item])]
        out.rows[item] = list(_rows(kind, values, doc, answers))
    first = [(p, n) for some in asked.values() for n, p in enumerate(some)]
    pairs = [
        (a, b)
        for p, n in dict.fromkeys(first)
        if p in set(twice)
        and (a := read(said[p, 0]["text"], n)) is not None
        and (b := read(said[p, 1]["text"], n)) is not None
    ]
    out.facts = _facts(section, key, said, pairs, out.rows)
    if kind == "preference":
        wins = [some[0]["value"] for some in out.rows.values()]
        out.facts["win_rate"] = float(np.nanmean(wins)) if np.isfinite(wins).any() else None
    return out


def _reader(kind: str) -> Callable[[str, int], float | None]:
    if kind == "preference":
        return lambda text, number: read_preference(text, first=number == 0)
    return lambda text, number: read_rating(text)


def _share(prompt: str) -> float:
    """A number in [0, 1) that depends on the prompt alone."""
    return int.from_bytes(sha256(prompt.encode()).digest()[:6], "big") / 2**48


def _said(
    wanted: Sequence[tuple[str, int]],
    ask: Ask,
    folder: Path,
    at_once: int,
    progress: Callable[[int], None],
) -> dict[tuple[str, int], dict[str, Any]]:
    """Every verdict, from its file or from the judge, which writes the file.

    at_once: requests under way together, from threads of their own if more than one.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def one(prompt: str, number: int) -> dict[str, Any]:
        path = folder / f"{sha256(prompt.encode()).hexdigest()[:32]}-{number}.json"
        known = _known(path)
        if known is None:
            started = time.monotonic()
            text, tokens = ask(prompt, number)
            known = {"text": text, "tokens": tokens, "seconds": time.monotonic() - started}
            write_json(path, known)
        return known

    out = {}
    for count, (key, verdict) in enumerate(_together(one, wanted, at_once), 1):
        out[key] = verdict
        progress(count)
    return out


def _together(
    one: Callable[[str, int], dict[str, Any]], wanted: Sequence[tuple[str, int]], at_once: int
) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """What `one` gives for each, as it comes; an error ends it, and nothing more is begun."""
    if at_once <= 1:
        yield from ((key, one(*key)) for key in wanted)
        return
    left, done, over = iter(wanted), SimpleQueue[Any](), threading.Event()

    def work() -> None:
        while not over.is_set():
            with turn:
                key = next(left, None)
            if key is None:
                return
            try:
                done.put((key, one(*key)))
            except BaseException as error:
                done.put((key, error))

    turn = threading.Lock()
    # Daemons, for a request that hangs must hold up neither the error of another nor Ctrl-C.
    for _ in range(min(at_once, len(wanted))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in wanted:
            key, found = done.get()
            if isinstance(found, BaseException):
                raise found
            yield key, found
    finally:
        over.set()


def _known(path: Path) -> dict[str, Any] | None:
    """A verdict that was given before; None if its file is not there or not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if {"text", "tokens", "seconds"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _rows(
    kind: str, values: Sequence[float | None], doc: Mapping[str, Any], answers: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """An item's metrics; NaN, which is no score, where a verdict could not be read."""
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    mean = float(np.mean(known)) if whole else float("nan")
    base = {"weight": 1.0, "extracted": None, "counts": None}
    if kind == "rating":
        outcome = "ok" if whole else "unparsed"
        yield base | {"metric": "rating", "value": mean / 10, "outcome": outcome}
        for turn, value in enumerate(values, 1):
            share = float("nan") if value is None else value / 10
            said = "unparsed" if value is None else "ok"
            yield base | {"metric": f"rating_turn_{turn}", "value": share, "outcome": said}
        return
    from reports.corpus import CORPUS_METRICS

    # An order that turns the verdict round says that there is nothing between the answers.
    turned = whole and sorted(known) == [0.0, 1.0]
    outcome = "order" if turned else "ok" if whole else "unparsed"
    yield base | {"metric": "win_rate", "value": mean, "outcome": outcome}
    counts, value = None, mean
    if whole:
        longer = len(answers[0]) - len(doc["reference"][0])
        counts, value = CORPUS_METRICS["lc_win_rate"].of_item(mean, longer)
    controlled = {"metric": "lc_win_rate", "value": value, "counts": counts}
    yield base | controlled | {"outcome": outcome}


def _facts(
    section: Judge,
    key: str,
    said: Mapping[Any, Mapping[str, Any]],
    pairs: Sequence[tuple[float, float]],
    rows: Mapping[Any, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """What a manifest keeps of a judge, and how far it agreed with itself."""
    difference = np.array([a - b for a, b in pairs])
    first = [some[0]["outcome"] for some in rows.values()]
    return {
        "identity": key,
        "model": section.model,
        "verdicts": len(said),
        "tokens": sum(int(one["tokens"]) for one in said.values()),
        "seconds": round(sum(float(one["seconds"]) for one in said.values()), 3),
        "unparsed": first.count("unparsed"),
        "order": first.count("order"),
        "again": len(pairs),
        "alike": float((difference == 0).mean()) if pairs else None,
        # Two verdicts differ by √2 standard deviations of one.
        "sd": float(np.sqrt((difference**2).mean() / 2)) if pairs else None,
    }


def sentence(facts: Mapping[str, Any]) -> str:
    """The judge in a sentence for reports."""
    text = f"judged by {facts['model']}: {facts['verdicts']} verdicts"
    if facts["unparsed"]:
        where = f"judgements/{facts['identity'][:16]}"
        text += f", {facts['unparsed']} items without a readable one, which stands in {where}: "
        text += "delete that and the measurement to ask again"
    if facts["order"]:
        text += f", {facts['order']} items turned by the order of answers"
    if facts["again"]:
        text += f"; {facts['again']} asked for twice, {facts['alike']:.0%} alike"
        text += f", sd {facts['sd']:.2f}"
    return text
