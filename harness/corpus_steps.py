"""Steps of a plan that read the corpus whatever is trained on it: its blocks, and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.hashing import corpus_hash
from harness.steps import VERSIONS, Plan, Step, model_bytes, planned_step, root, tokenizer_identity

if TYPE_CHECKING:
    from fusion.spec import Merge


def packed_corpus(out: Plan, name: str, row: str, domains: Sequence[str] | None = None) -> Step:
    """The corpus, or domains of it, as blocks of the tokens of `row`, for the variant `name`."""
    recipe, corpus = out.recipe, out.recipe.corpus
    assert corpus
    content: dict[str, Any] = {
        "corpus": corpus_hash(out.home, corpus.path),
        "blocks": corpus.blocks,
        "tokens": corpus.tokens,
        "tokenizer": tokenizer_identity(out, row),
        "seed": recipe.seed,
        "version": VERSIONS["pack"],
    }
    content |= {"domains": sorted(domains)} if domains else {}
    called = "+".join(sorted(domains or ["corpus"]))
    needs, first = (out.identities[row],), root(recipe, row)
    return out.add(
        planned_step(out, "pack", called, content, needs, name, row=first, tokens=corpus.tokens)
    )


def statistics(out: Plan, name: str, merge: Merge) -> list[Step]:
    """The statistics of each input that the merge method takes, in order; none for most methods.

    They belong to a model, the corpus and how many of its blocks are read: any merge that asks for
    the same has them already.
    """
    from fusion.merging import COLLECTED, parameters

    if merge.method not in COLLECTED:
        return []
    kind, keys = COLLECTED[merge.method]
    defaults = {key: parameters(merge.method)[key].default for key in keys}
    given: dict[str, Any] = {key: merge.parameters.get(key, defaults[key]) for key in keys}
    packed = packed_corpus(out, name, merge.base or merge.inputs[0])
    corpus = out.recipe.corpus
    assert corpus
    seed = {"seed": out.recipe.seed} if given.get("labels") == "model" else {}
    steps = []
    for row in merge.inputs:
        model = out.identities[row]
        content = {
            "statistics": kind,
            "model": model,
            "corpus": packed.identity,
            "version": VERSIONS["statistics"],
            **given,
            **seed,
        }
        steps.append(
            out.add(
                planned_step(
                    out,
                    "statistics",
                    row,
                    content,
                    (model, packed.identity),
                    name,
                    row=row,
                    tokens=min(given["blocks"] * corpus.blocks, corpus.tokens),
                    disk=model_bytes(out, row),
                )
            )
        )
    return steps
