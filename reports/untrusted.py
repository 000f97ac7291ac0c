"""Text that others wrote (names, prompts, outputs), made fit to stand on a page.

Escaping is the template's; what is done here is what escaping leaves: characters that a page cannot
hold, that turn the reading direction of what follows, or that are too many.
"""

from __future__ import annotations

import json
import re
from typing import Any

LONGEST = 20_000  # characters of one text on a page

# Tab and line feed may stay. Embeddings, overrides and isolates reorder what stands after them.
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def plain(text: str, longest: int = LONGEST) -> str:
    """The text with control characters and directional overrides shown as signs, and bounded."""
    return clipped(_UNFIT.sub(_sign, text.replace("\r\n", "\n")), longest)


def _sign(found: re.Match[str]) -> str:
    code = ord(found.group())
    if code < 0x20:
        return chr(0x2400 + code)  # control pictures, as in "␀"
    return f"⟨U+{code:04X}⟩" if 0x2000 < code < 0xD800 else "\N{REPLACEMENT CHARACTER}"


def clipped(text: str, longest: int) -> str:
    """Beginning and end of a text that is too long, and how much is left out between them."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def script_json(content: Any) -> str:
    """JSON that may stand inside a script element: no `<`, `>`, `&`, nothing beyond ASCII."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text
