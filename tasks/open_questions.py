"""Rows of sets that are answered in free text become documents: prompt, gold, id, cluster.

As in `questions`, functions named like a set render rows, and those that end in `_rows` read rows
out of a folder's files. A row without an answer is a ValueError that names it: nothing could ever
be right there.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

from tasks.questions import Document, Row, json_rows

BOOKS = (
    "atkins",
    "calculus",
    "chemmc",
    "class",
    "diff",
    "fund",
    "matter",
    "quan",
    "stat",
    "thermo",
)
# A unit that begins with a power of ten: the power, and what is left of the unit.
_POWER = re.compile(r"10\^\{?\s*(-?\d+)\s*\}?\s*\$?")
_SEGMENT = re.compile(r'<seg id="(\d+)">(.*?)</seg>', re.DOTALL)


def triviaqa(rows: Iterable[Row]) -> Iterator[Document]:
    """TriviaQA without contexts; gold: the aliases as its authors normalise them.

    A question mark is added to every question, also to those that have one: so lm-eval asks. A
    question that comes with web pages and with Wikipedia is there twice, which is one cluster.
    """
    for row in rows:
        name = row["question_id"]
        gold = list(dict.fromkeys(row["answer"]["normalized_aliases"]))
        prompt = f"Question: {row['question']}?\nAnswer:"
        yield {"id": name, "prompt": prompt, "gold": _some(name, gold), "cluster": name}


def mt_bench(rows: Iterable[Row]) -> Iterator[Document]:
    """MT-Bench in the hub's columns: prompt (its turns), reference (right answers), category."""
    for row in rows:
        turns, right = list(row["prompt"]), list(row.get("reference") or [])
        yield _talk(str(row["prompt_id"]), turns, right) | {"category": row["category"]}


def mt_bench_rows(questions: bytes, answers: bytes) -> Iterator[Row]:
    """Rows of the authors' two files: the questions, and right answers to some of them."""
    right = {row["question_id"]: row["choices"][0]["turns"] for row in json_rows(answers)}
    for row in json_rows(questions):
        number = row["question_id"]
        yield {
            "prompt_id": number,
            "category": row["category"],
            "prompt": row["turns"],
            "reference": right.get(number, []),
        }


def alpaca_eval(rows: Iterable[Row]) -> Iterator[Document]:
    """AlpacaEval with the answers that others are held against."""
    for number, row in enumerate(rows):
        talk = _talk(str(number), [row["instruction"]], [row["output"]])
        yield talk | {"category": row["dataset"]}


def alpaca_eval_rows(raw: bytes) -> list[Row]:
    """Rows of the file with the answers: one list."""
    rows: list[Row] = json.loads(raw)
    return rows


def _talk(name: str, turns: list[str], right: list[str]) -> Document:
    return {
        "id": name,
        "prompt": turns[0],
        "messages": [["user", turns[0]]],
        "turns": turns,
        "reference": right,
        "cluster": name,
    }


def gsm8k(rows: Iterable[Row]) -> Iterator[Document]:
    """GSM8K in the hub's columns; gold: the number behind the last "####"."""
    for number, row in enumerate(rows):
        _, found, gold = row["answer"].rpartition("#### ")
        own = {"question": row["question"], "answer": row["answer"]}
        yield {"id": str(number), **own, "gold": _some(str(number), found and gold.strip())}


def ifeval(rows: Iterable[Row]) -> Iterator[Document]:
    """IFEval in the hub's columns: a prompt, its instructions and their arguments."""
    for row in rows:
        some = zip(row["instruction_id_list"], row["kwargs"], strict=True)
        kwargs = [{k: v for k, v in given.items() if v is not None} for _, given in some]
        name = str(row["key"])
        own = {key: row[key] for key in ("key", "prompt", "instruction_id_list")}
        yield {"id": name, **own, "kwargs": kwargs, "gold": name, "cluster": name}


def drop(rows: Iterable[Row]) -> Iterator[Document]:
    """DROP; gold: one list of spans for each answer that was accepted. A passage is one cluster."""
    for row in rows:
        answers = row["answers"] if "answers" in row else _drop_answers(row)
        yield {
            "id": row["query_id"],
            "prompt": f"{row['passage']} {row['question']}",
            "gold": _some(row["query_id"], [list(spans) for spans in answers]),
            "cluster": hashlib.sha1(row["passage"].encode()).hexdigest()[:12],
        }


def _drop_answers(row: Row) -> list[tuple[str, ...]]:
    """The answers of the hub's columns, each once: a number, spans or a date."""
    validated = row["validated_answers"]
    columns = zip(validated["number"], validated["date"], validated["spans"], strict=True)
    others = [{"number": n, "date": d, "spans": s} for n, d, s in columns]
    found: dict[tuple[str, ...], None] = {}
    for answer in [row["answer"], *others]:
        date = " ".join(answer["date"][part] for part in ("day", "month", "year")).strip()
        if answer["number"]:
            found[(str(answer["number"]),)] = None
        else:
            found[tuple(answer["spans"]) or (date,)] = None
    return list(found)


def lambada(rows: Iterable[Row]) -> Iterator[Document]:
    """LAMBADA: a passage without its last word, which is what stands behind its last space."""
    for number, row in enumerate(rows):
        prompt, _, word = row["text"].rpartition(" ")
        yield {"id": str(number), "prompt": prompt, "gold": _some(str(number), word)}


def iwslt2017_rows(source: bytes, reference: bytes) -> Iterator[Row]:
    """Segments of tst2017, from English to German.

    An archive holds only its own source side, so that the reference comes from the archive of the
    other direction. ValueError if the two do not hold the same segments.
    """
    sides = [_segments(source, "en-de", "en"), _segments(reference, "de-en", "de")]
    if [number for number, _ in sides[0]] != [number for number, _ in sides[1]]:
        raise ValueError("the two archives do not hold the same segments")
    for number, ((_, asked), (_, gold)) in enumerate(zip(*sides, strict=True)):
        yield {"id": str(number), "en": asked, "de": gold}


def _segments(raw: bytes, pair: str, language: str) -> list[tuple[str, str]]:
    name = f"{pair}/IWSLT17.TED.tst2017.{pair}.{language}.xml"
    try:
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            found = archive.extractfile(name)
            text = found.read().decode() if found else ""
    except (tarfile.TarError, EOFError, KeyError) as error:
        raise ValueError(f"{pair}.tgz: no whole archive with {name} ({error})") from error
    return [(number, html.unescape(said).strip()) for number, said in _SEGMENT.findall(text)]


def iwslt2017(rows: Iterable[Row]) -> Iterator[Document]:
    """IWSLT 2017's talks, English to German, in the words of lm-eval's translation tasks."""
    for row in rows:
        prompt = f"English phrase: {row['en']}\nGerman phrase:"
        yield {"id": row["id"], "prompt": prompt, "gold": _some(row["id"], row["de"])}


def scibench_rows(*books: bytes) -> Iterator[Row]:
    """The problems of SciBench's ten textbooks, one file a book."""
    for raw in books:
        yield from json.loads(raw)


def scibench(rows: Iterable[Row]) -> Iterator[Document]:
    """SciBench as its authors ask it without examples; gold: the number, as text.

    A power of ten in the unit is taken out of the unit and into the number, as they do, unless
    nothing else is left of the unit.
    """
    for number, row in enumerate(rows):
        unit, gold = row["unit"].strip(), _number(row["answer_number"])
        power = list(_POWER.finditer(unit))
        left = unit[power[-1].end() :].strip() if power else ""
        if left.strip("$"):
            unit = "$" * (left.count("$") % 2) + left  # the formula began before the power
            gold = float(Decimal(repr(gold)).scaleb(int(power[-1][1])))
        asked = row["problem_text"].strip() + (
            f" The unit of the answer is {unit}." if unit else ""
        )
        name = f"{row['source'].strip()}:{row['problemid'].strip()}:{number}"
        yield {"id": name, "prompt": f"Q: {asked}\nA: The answer is", "gold": repr(gold)}


def _number(text: str) -> float:
    """A number as printed: with thousands' commas, and a minus that is no hyphen."""
    return float(text.strip().replace(",", "").replace("\u2212", "-"))


def _some(name: str, gold: Any) -> Any:
    """The gold answer; ValueError if there is none."""
    if not gold:
        raise ValueError(f"question {name} has no answer")
    return gold
