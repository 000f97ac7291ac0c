"""`kfuse inspect-alignment`: what two tokenizers have in common on a text, for a person to see.

Mass is counted in tokens of the text, as its source reads it: kept where the target has a token of
the same bytes, spread where only a first piece of them, lost where none.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fusion.alignment import align_boundaries, kinds
from fusion.corpus import Piece
from fusion.errors import RecipeError, RunError
from fusion.tokens import token_bytes, tokenize
from fusion.vocabulary import build, count_pairs, needs_counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = """The baker counts seven apples, and nobody asks why: "It's 12,345 grams," she says.
In 1987 the old captain paid 3.14159 crowns for 2048 ropes; the bill said No. 007-B.

def area(width, height):
    return width * height  # four spaces, then a comment

Überraschung! La garçonne a mangé un gâteau à Besançon. Добрый вечер, сосед.
面包师数了七个苹果。パン屋はりんごを七つ数えます。빵집 주인이 사과를 센다. 👩‍🌾🍞
"""
CJK = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7AF), (0x3000, 0x303F))


@dataclass(frozen=True, slots=True)
class Inspection:
    """How a source's positions and vocabulary meet a target's on one text.

    kinds: target tokens by kind of group. classes: (covered, all) target tokens by kind of text.
    mass: source tokens kept, spread, lost. uncovered: the target tokens most often left out.
    """

    size: int
    source_tokens: int
    target_tokens: int
    covered: int
    kinds: dict[str, int]
    classes: dict[str, tuple[int, int]]
    mass: dict[str, int]
    uncovered: list[tuple[str, int]]


def inspect(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, text: str, method: str
) -> Inspection:
    """Align a text's two tokenizations and carry its source tokens through a vocabulary map."""
    theirs, ours = tokenize(source, text), tokenize(target, text)
    covered = np.zeros(len(ours.ids), dtype=bool)
    covered[align_boundaries(ours.ends, theirs.ends)[:, 0]] = True
    content = text.encode()
    pieces = [content[a:b] for a, b in zip([0, *ours.ends], ours.ends, strict=False)]
    classes: dict[str, tuple[int, int]] = {}
    for piece, good in zip(pieces, covered, strict=True):
        seen = classes.get(text_class(piece), (0, 0))
        classes[text_class(piece)] = (seen[0] + bool(good), seen[1] + 1)
    left = Counter(shown(p) for p, good in zip(pieces, covered, strict=True) if not good)
    return Inspection(
        len(content),
        len(theirs.ids),
        len(ours.ids),
        int(covered.sum()),
        kinds(ours.ends, theirs.ends),
        dict(sorted(classes.items())),
        _mass(source, target, text, theirs.ids, method),
        left.most_common(12),
    )


def _mass(
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    text: str,
    ids: np.ndarray,
    method: str,
) -> dict[str, int]:
    counts = None
    if needs_counts(method):  # the text is all there is to count in
        tokens = tokenize(target, text)
        piece = Piece(0, "text", text, False, tokens.ids, tokens.ends)
        counts = count_pairs([[piece]], source, target)
    vocabulary_map = build(source, target, method, counts=counts)
    source_bytes, target_bytes = token_bytes(source), token_bytes(target)
    mass = {"kept": 0, "spread": 0, "lost": 0}
    for index in ids:
        images = vocabulary_map.indices[slice(*vocabulary_map.indptr[index : index + 2])]
        same = any(target_bytes[image] == source_bytes[index] for image in images)
        mass["kept" if same else "spread" if len(images) else "lost"] += 1
    return mass


def text_class(piece: bytes) -> str:
    """digits, whitespace, CJK, part of a character, letters, or punctuation and signs."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return "part of a character"
    if not text.strip():
        return "whitespace"
    if any(low <= ord(c) <= high for c in text for low, high in CJK):
        return "CJK"
    if any(c.isdigit() for c in text):
        return "digits"
    return "letters" if any(c.isalpha() for c in text) else "punctuation and signs"


def shown(piece: bytes) -> str:
    """A token's bytes for the eye: spaces as middle dots, line breaks and odd bytes escaped."""
    text = piece.decode(errors="backslashreplace")
    return text.replace(" ", "·").replace("\n", "\\n").replace("\t", "\\t") or "(no width)"


def side_by_side(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, sentence: str
) -> tuple[str, str]:
    """The sentence as each side cuts it; a double bar where both do, a single one elsewhere."""
    content = sentence.encode()
    ends = [tokenize(tokenizer, sentence).ends.tolist() for tokenizer in (source, target)]
    common = set(ends[0]) & set(ends[1])
    lines = []
    for own in ends:
        cut = [
            shown(content[a:b]) + ("‖" if b in common else "|")
            for a, b in zip([0, *own], own, strict=False)
            if b > a
        ]
        lines.append("".join(cut))
    return lines[0], lines[1]


def describe(
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    text: str,
    method: str,
    names: tuple[str, str],
) -> str:
    """The whole of it as text for a terminal."""
    found = inspect(source, target, text, method)
    sentence = next(line for line in text.splitlines() if line.strip())[:100]
    pictures = side_by_side(source, target, sentence)
    wide = max(map(len, names))
    read = max(1, found.source_tokens)
    share = f"{found.covered / max(1, found.target_tokens):.1%}"
    lines = [
        f"{names[0]} → {names[1]}: {found.size:,} bytes, {found.source_tokens:,} source tokens, "
        f"{found.target_tokens:,} target tokens",
        f"coverage: {share} of the target's tokens end where a source token ends",
        "",
        *(f"  {k:<22} {n:>7,}" for k, n in found.kinds.items()),
        "",
        "coverage by kind of text",
        *(f"  {k:<22} {n:>7,} of {m:,}" for k, (n, m) in found.classes.items()),
        "",
        f"the source's tokens of this text through the vocabulary map '{method}'",
        *(f"  {k:<22} {n:>7,}  {n / read:.1%}" for k, n in found.mass.items()),
        "",
        "target tokens most often without a partner",
        "  " + ("  ".join(f"{token} ×{n}" for token, n in found.uncovered) or "none"),
        "",
        "one sentence; ‖ both cut here, | one does",
        *(f"  {name:<{wide}}  {line}" for name, line in zip(names, pictures, strict=True)),
    ]
    return "\n".join(lines)


def inspect_alignment(source: str, target: str, text: Path | None, method: str) -> str:
    """Fetch two models' tokenizers as a recipe would, and describe how they meet."""
    from fusion.models import load_tokenizer
    from fusion.vocabulary import VOCABULARY_MAPS
    from harness.build import build as build_rows
    from harness.checks import close
    from harness.model_folder import model_folder
    from harness.plan import plan
    from harness.recipe import parse
    from harness.store import home

    if method not in VOCABULARY_MAPS:
        known = ", ".join(VOCABULARY_MAPS)
        raise RecipeError(
            f"--vocabulary {method}: known: {known}{close(method, [*VOCABULARY_MAPS])}"
        )
    content = SAMPLE
    if text:
        try:
            content = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"--text {text}: not readable as UTF-8 ({error})") from error
    if not content.strip():
        raise RunError(f"--text {text}: holds no text")
    sources = {"source": {"path": source}, "target": {"path": target}}
    wanted = {
        "sources": sources,
        "evaluate": {"suites": ["tiny_text"]},
        "reference": "target",
    }
    recipe = parse(json.dumps(wanted), "inspect-alignment")
    planned = plan(recipe, home())
    failed = build_rows(planned, list(sources))
    if failed:
        raise RunError("; ".join(failed.values()))
    planned = plan(recipe, home())
    tokenizers = [load_tokenizer(model_folder(planned, row)) for row in sources]
    return describe(tokenizers[0], tokenizers[1], content, method, (source, target))
