"""BIG-Bench Hard as lm-eval's `bbh_cot_fewshot` (version 4) asks it: 27 tasks, 6,511 questions.

Requests are those of the stock tasks, character by character: three solved exemplars, "Let's think
step by step." behind each question, greedy, at most 1,024 tokens. Its rules are kept where they
are known to mislead: a capital Q ends a generation, and an answer is what follows "the answer is"
less its last character, compared exactly. It departs from lm-eval in the average: tasks count
alike here, by their sizes there (24 of the 27 have 250 questions).

Questions come from a local folder (--data), the hub or HF_DATASETS_CACHE; they are in no package.
"""

from tasks.bbh81 import NAMES
from tasks.suite import Suite, Task

SUITE = Suite(
    name="bbh@lm_eval",
    title="BBH (lm-eval)",
    tasks=tuple(
        Task(
            f"kfuse_bbh_lm_eval_{name}",
            "exact_match",
            True,
            None,
            name.replace("_", " "),
            filter="get-answer",
            shots=3,
        )
        for name in NAMES
    ),
    datasets=tuple(f"bbh_{name}" for name in NAMES),
    reference="lm-eval 0.4.13, bbh_cot_fewshot",
)
