"""Three trivial own functions to complete, for tests and for `kfuse run tiny`; no downloads.

Mirrors the form of `code`, with its sandboxed execution, and measures nothing worth reporting.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="tiny_code",
    title="Tiny code",
    tasks=(Task("kfuse_tiny_code", "pass@1", True, None, "functions"),),
    executes_code=True,
    reference="written for kfuse",
)
