"""BIG-Bench Hard as FuseLLM reports it: 27 tasks, 6,511 questions, three solved exemplars each.

The protocol is open-instruct's of late 2023: the official chain-of-thought prompts, "Q: …" and
"A:" behind them, greedy, at most 512 tokens, a blank line ends; the answer is what follows "the
answer is" up to the next full stop, else everything; case and punctuation are ignored; an
unweighted mean over the tasks. It departs from it where that code stops at the last ids of a blank
line only: stop strings are exact here.

Questions come from a local folder (--data), the hub or HF_DATASETS_CACHE; they are in no package.
"""

from tasks.bbh81 import NAMES
from tasks.suite import Suite, Task

SUITE = Suite(
    name="bbh@fusellm",
    title="BBH (FuseLLM)",
    tasks=tuple(
        Task(
            f"kfuse_bbh_fusellm_{name}",
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
    reference="FuseLLM 2401.10491, table 1",
)
