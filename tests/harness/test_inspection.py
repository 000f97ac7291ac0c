"""What `kfuse inspect-alignment` counts and says."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.errors import RecipeError, RunError
from fusion.models import load_tokenizer
from fusion.vocabulary import VOCABULARY_MAPS
from harness.inspection import (
    SAMPLE,
    inspect,
    inspect_alignment,
    shown,
    side_by_side,
    text_class,
)


def test_a_tokenizer_meets_itself_everywhere(tiny: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tiny["llama"])
    found = inspect(tokenizer, tokenizer, SAMPLE, "exact")
    assert found.covered == found.target_tokens == found.source_tokens
    assert found.mass == {"kept": found.source_tokens, "spread": 0, "lost": 0}
    assert found.uncovered == []
    assert found.kinds["one-to-one"] == found.target_tokens


def test_counts_add_up_and_name_what_is_hard(tiny: dict[str, Path]) -> None:
    source, target = load_tokenizer(tiny["gemma"]), load_tokenizer(tiny["llama"])
    found = inspect(source, target, SAMPLE, "prefix")
    assert sum(found.mass.values()) == found.source_tokens
    assert sum(found.kinds.values()) == found.target_tokens
    assert sum(n for n, _ in found.classes.values()) == found.covered
    assert sum(n for _, n in found.classes.values()) == found.target_tokens
    assert {"digits", "letters", "part of a character"} <= set(found.classes)


def test_both_cuts_are_drawn(tiny: dict[str, Path]) -> None:
    source, target = load_tokenizer(tiny["gemma"]), load_tokenizer(tiny["llama"])
    lines = side_by_side(source, target, "The baker\tcounts 12.")
    for line in lines:
        assert line.replace("‖", "").replace("|", "") == "The·baker\\tcounts·12."
        assert line.endswith("‖")
    assert lines[0].count("‖") == lines[1].count("‖")


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (b"12", "digits"),
        (b" \n", "whitespace"),
        ("面".encode(), "CJK"),
        (b"\xf0\x9f", "part of a character"),
        (" Ü".encode(), "letters"),
        (b' "', "punctuation and signs"),
    ],
)
def test_kinds_of_text(piece: bytes, kind: str) -> None:
    assert text_class(piece) == kind
    assert shown(piece)


def test_it_takes_paths_as_a_recipe_does_and_says_what_is_wrong(home: Path) -> None:
    said = inspect_alignment("tiny:gemma", "tiny:llama", None, "prefix")
    assert "coverage: " in said
    assert "‖" in said
    with pytest.raises(RecipeError, match=r"known: prefix, exact, .*\(exact\?\)"):
        inspect_alignment("tiny:gemma", "tiny:llama", None, "exakt")
    with pytest.raises(RunError, match="--text"):
        inspect_alignment("tiny:gemma", "tiny:llama", home / "none.txt", "prefix")
    with pytest.raises(RunError, match="does not exist"):
        inspect_alignment("/no/model", "tiny:llama", None, "prefix")


def test_every_map_can_be_looked_at(home: Path) -> None:
    for method in VOCABULARY_MAPS:
        assert f"vocabulary map '{method}'" in inspect_alignment(
            "tiny:gemma", "tiny:llama", None, method
        )
