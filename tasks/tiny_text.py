"""Six own paragraphs in two domains, for tests and for `kfuse run tiny`; no downloads.

Mirrors the form of `bits_per_byte` and measures nothing worth reporting.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="tiny_text",
    title="Tiny text",
    tasks=(
        Task("kfuse_tiny_nature", "bits_per_byte", False, None, "nature"),
        Task("kfuse_tiny_craft", "bits_per_byte", False, None, "craft"),
    ),
    reference="written for kfuse",
)
