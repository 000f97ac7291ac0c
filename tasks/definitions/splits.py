"""Documents of several prepared sets as the splits that a task file of lm-eval's names."""

from __future__ import annotations

from typing import Any

from tasks.definitions.data import documents


def prepared(splits: dict[str, str], data_dir: str | None = None, **_: Any) -> dict[str, Any]:
    """Each split's documents, in `<data_dir>/<dataset>.jsonl`; splits: datasets by split."""
    from datasets import Dataset

    return {split: Dataset.from_list(documents(name, data_dir)) for split, name in splits.items()}
