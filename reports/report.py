"""Write a report's files beside its index, each whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from reports.cells import Report
from reports.formats import FORMATS
from reports.html import page
from reports.table import read


def write(index: Path) -> dict[str, Path]:
    """Markdown, CSV and HTML of an index file, beside it, by format. Errors name the file."""
    return save(read(index), index.parent)


def save(report: Report, folder: Path) -> dict[str, Path]:
    """A report's Markdown, CSV and HTML in a folder, by format. OSError as it comes."""
    made = {name: (file, render(report)) for name, (file, render) in FORMATS.items()}
    made["html"] = ("report.html", page(report))
    out = {}
    for name, (file, text) in made.items():
        path = folder / file
        partial = path.with_name(f".{file}.{os.getpid()}")
        # A name may hold half a surrogate pair, which no file can.
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
        out[name] = path
    return out
