"""How many questions of a suite share a run of words with the text that rows were trained on.

Questions of benchmarks that stand in the corpus make a row that read it look better. The test is
the usual one: N words in a row, N = 13 (GPT-3, 2005.14165, appendix C; lm-evaluation-harness).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness import mirror
from harness.plan import Plan
from harness.store import identity, write_json

N = 13
VERSION = 1  # raise when the same texts come to other counts
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it vanishes


def overlap(questions: Sequence[str], corpus: Iterable[str], n: int = N) -> dict[str, int]:
    """Counts: items, those too short for a run of n words, those with a run found in the corpus.

    Words are runs of letters and digits in lower case; a run does not go from one text of the
    corpus into the next. Runs are compared by a 64-bit polynomial hash: of 10⁶ runs in questions
    and 10⁹ in a corpus, a false match comes up in one report of twenty thousand.

    Relative to GPT-3: every run of n words counts, also one that stands in many texts; questions
    shorter than n words are told apart in place of a smaller n.
    """
    vocabulary: dict[str, int] = {}
    runs = [
        _runs([vocabulary.setdefault(w, len(vocabulary) + 1) for w in _words(text)], n)
        for text in questions
    ]
    wanted = np.unique(np.concatenate([*runs, np.zeros(0, np.uint64)]))
    seen = np.zeros(len(wanted), dtype=bool)
    read = 0
    for text in corpus:
        # A word that no question has makes a run that no question has.
        words = [vocabulary.get(word, 0) for word in _words(text)]
        read += len(words)
        here = np.unique(_runs(words, n))
        if len(here) and len(wanted):
            place = np.searchsorted(wanted, here).clip(max=len(wanted) - 1)
            seen[place[wanted[place] == here]] = True
    hit = wanted[seen]
    return {
        "items": len(runs),
        "short": sum(not len(run) for run in runs),
        "found": sum(bool(np.isin(run, hit).any()) for run in runs),
        "corpus_words": read,
        "n": n,
    }


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _runs(words: Sequence[int], n: int) -> np.ndarray:
    """Hashes Σ_k w_k · BASE^(n−1−k) mod 2⁶⁴ of every n words in a row, (max(0, words − n + 1),)."""
    if len(words) < n:
        return np.zeros(0, np.uint64)
    ids = np.array(words, dtype=np.uint64)
    out = np.zeros(len(ids) - n + 1, np.uint64)
    for k in range(n):
        out = out * _BASE + ids[k : len(ids) - n + 1 + k]
    return out


def contamination(plan: Plan, prompts: dict[str, dict[str, Path]]) -> list[dict[str, Any]]:
    """The overlap of every suite with all corpora of the plan that are packed; none without one.

    prompts: by suite and protocol, as `harness.prompts` gives them. Counted once and remembered.
    """
    import pandas as pd

    packs = [s for s in plan.builds() if s.kind == "pack" and s.done]
    if not packs:
        return []
    out = []
    for suite, files in prompts.items():
        for protocol, path in files.items():
            key = identity([VERSION, N, protocol, sorted(step.identity for step in packs)])
            known = plan.home / "data" / f"overlap-{key[:16]}.json"
            if not known.exists():
                for step in packs:
                    mirror.bring(step.folder)
                questions = pd.read_parquet(path, columns=["question"]).question.tolist()
                texts = (t for s in packs for t in _texts(s.folder / "blocks.parquet"))
                write_json(known, overlap(questions, texts))
            out.append({"suite": suite, "protocol": protocol} | _read(known))
    return out


def _texts(path: Path) -> Iterator[str]:
    """The pieces of a packed corpus, a few at a time."""
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(1024, columns=["text", "messages"]):
        for row in batch.to_pylist():
            turns = [turn["content"] for turn in row["messages"]]
            yield from turns or [row["text"]]


def _read(path: Path) -> dict[str, Any]:
    from reports.records import read_json

    return read_json(path)
