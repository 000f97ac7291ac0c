"""A report as one self-contained page: no network, light and dark, phone, print and keyboard.

The page carries one script of our own; its policy allows that script by its hash and no other, and
texts reach the page escaped or as JSON that the script sets as text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reports import (
    formats,
    items,
    making_panels,
    reference_panels,
    score_panels,
    trust_panels,
)
from reports.cells import Report
from reports.panels import Draw, Panel
from reports.untrusted import plain, script_json

PANELS: Mapping[str, Draw] = {
    **score_panels.PANELS,
    **reference_panels.PANELS,
    **trust_panels.PANELS,
    **items.PANELS,
    **making_panels.PANELS,
    **trust_panels.LAST,
}


def panels(report: Report) -> dict[str, Panel]:
    """The panels that have something to show, in the order of the page."""
    drawn = {name: draw(report) for name, draw in PANELS.items()}
    return {name: _folded(panel) for name, panel in drawn.items() if panel}


LONG = 60  # lines of tables that a reader would have to scroll past


def _folded(panel: Panel) -> Panel:
    long = sum(len(table.rows) for table in panel.tables) > LONG
    return replace(panel, folded=True) if long else panel


def page(report: Report) -> str:
    """A report's page; every text in it is escaped, whatever names and outputs hold."""
    return render(report.recipe, formats.headline(report), panels(report))


def render(title: str, headline: str, shown: Mapping[str, Panel]) -> str:
    """Panels as one page under a title and a sentence."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    room = Path(__file__).parent
    data = {name: panel.data for name, panel in shown.items() if panel.data}
    script, style = (room / "page.js").read_text(), (room / "page.css").read_text()
    environment = Environment(
        loader=FileSystemLoader(room),
        autoescape=True,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        headline=headline,
        panels=shown,
        svg=Markup,  # of our own drawing
        script=Markup(script),
        script_hash=Markup(_hash(script)),
        style=Markup(style),
        style_hash=Markup(_hash(style)),
        data=Markup(script_json(data)),
    )


def _finalize(value: Any) -> Any:
    """Everything that the template prints goes through here before it is escaped."""
    return plain(value) if type(value) is str else value


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
