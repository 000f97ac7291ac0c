"""A dozen own questions with given choices, for tests and for `kfuse run tiny`; no downloads.

Mirrors the form of `commonsense` and measures nothing worth reporting: every number on it is noise.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="tiny_choice",
    title="Tiny choices",
    tasks=(
        Task("kfuse_tiny_science", "acc_norm", True, 0.25, "science"),
        Task("kfuse_tiny_yes_no", "acc", True, 0.5, "yes/no"),
    ),
    reference="written for kfuse",
)
