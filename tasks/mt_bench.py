"""MT-Bench: 80 conversations of two turns in eight categories, each answer graded by a judge.

The model answers both questions by its own chat template, the second after its own first answer,
greedily with at most 1,024 tokens. A grade goes from 1 to 10 and is reported as a share of ten:
70.2 % is 7.02. Where the set has a right answer (mathematics, reasoning, coding) the judge sees it.

Relative to the paper (2306.05685): its temperatures by category are not used, so answers are the
same each time; the judge's instructions are our words; the mean is over categories of equal size,
which is that over all grades. Numbers of unlike judges never compare: the judge is in the protocol.
"""

from tasks.suite import Suite, Task

CATEGORIES = {
    "writing": "writing",
    "roleplay": "role play",
    "reasoning": "reasoning",
    "math": "mathematics",
    "coding": "coding",
    "extraction": "extraction",
    "stem": "sciences",
    "humanities": "humanities",
}
SUITE = Suite(
    name="mt_bench",
    title="MT-Bench (grade of 10)",
    tasks=tuple(
        Task(f"kfuse_mt_bench_{name}", "rating", True, None, title)
        for name, title in CATEGORIES.items()
    ),
    judged="rating",
    datasets=("mt_bench",),
    reference="MT-Bench 2306.05685",
)
