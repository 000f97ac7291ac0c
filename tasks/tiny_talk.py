"""Two conversations of two turns, for tests and for `kfuse run tiny`; no downloads.

Mirrors the form of `mt_bench` and measures nothing worth reporting.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="tiny_talk",
    title="Tiny conversations",
    tasks=(Task("kfuse_tiny_talk", "rating", True, None, "conversations"),),
    judged="rating",
    reference="written for kfuse",
)
