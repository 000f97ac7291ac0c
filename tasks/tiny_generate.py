"""Six own questions with short free answers, for tests and for `kfuse run tiny`; no downloads.

Mirrors the form of `bbh81` (shots in the prompt, a regex that takes the answer, exact match) and
measures nothing worth reporting.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="tiny_generate",
    title="Tiny generation",
    tasks=(
        Task(
            "kfuse_tiny_generate",
            "exact_match",
            True,
            None,
            "short answers",
            filter="get-answer",
            shots=2,
        ),
    ),
    reference="written for kfuse",
)
