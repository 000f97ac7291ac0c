"""`kfuse help`: pages about one subject each, Markdown files in `pages/`.

A page is a file, its name the file's and its title the first line; nothing else registers it. What
its blocks say is executed by a test, so that a page cannot say what is no longer so.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fusion.errors import RecipeError

PAGES = Path(__file__).with_name("pages")


def titles() -> dict[str, str]:
    """What each page is about, by its name, sorted."""
    found = {}
    for path in sorted(PAGES.glob("*.md")):
        with path.open(encoding="utf-8") as lines:
            found[path.stem] = lines.readline().removeprefix("#").strip()
    return found


def listing() -> str:
    """The pages, a line each."""
    known = titles()
    width = max(map(len, known))
    lines = [f"  {name:<{width}}  {title}" for name, title in known.items()]
    return "\n".join(["`kfuse help PAGE` shows a page:", *lines])


def read_page(name: str) -> str:
    """A page's Markdown; RecipeError lists the known ones and a close match."""
    known = list(titles())
    if name not in known:
        from harness.checks import close

        raise RecipeError(f"no page '{name}'; pages: {', '.join(known)}{close(name, known)}")
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def show(name: str | None) -> None:
    """Print a page, or which there are: rendered on a terminal, as it is written elsewhere."""
    text = read_page(name) if name else listing()
    if name and sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
        return
    print(text.rstrip())
