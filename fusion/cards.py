"""What a merged folder says about itself: its section of a recipe, and a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fusion.merging import MERGE_METHODS


def describe(folder: Path, section: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Write `merge.yaml`, the merge section of a recipe, and README.md, a card, in a folder."""
    given = {key: value for key, value in section.items() if value not in (None, {})}
    text = yaml.safe_dump({"merge": given}, sort_keys=False, allow_unicode=True)
    (folder / "merge.yaml").write_text(text)
    method = MERGE_METHODS.get(section["method"])
    told = (method.__doc__ or "").strip().splitlines()[:1] if method else []
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [merge]",
        "---",
        f"# {section['method']} merge of {', '.join(section['inputs'])}",
        "",
        *told,
        "",
        "Made by kfuse; `manifest.json`, where it is there, identifies the inputs by content.",
        "",
        "```yaml",
        text.rstrip(),
        "```",
    ]
    if notes:
        lines += ["", "The models differ in:", "", *(f"- {note}" for note in notes)]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
