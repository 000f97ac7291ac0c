"""Nine sets of questions with given choices, scored by log-likelihood, without shots.

The five of `commonsense@fusellm` (2401.10491), and PIQA, WinoGrande, CommonsenseQA and Social IQa
on their validation splits; an unweighted mean over the nine. Prompts, choices and metrics are those
of lm-eval's stock tasks, character by character: CommonsenseQA shows its choices and asks for the
letter, WinoGrande predicts what follows the gap.
"""

from tasks.commonsense__fusellm import SUITE as FIVE
from tasks.suite import Suite, Task

SUITE = Suite(
    name="commonsense",
    title="Commonsense",
    tasks=(
        *FIVE.tasks,
        Task("kfuse_piqa", "acc_norm", True, 0.5, "PIQA"),
        Task("kfuse_winogrande", "acc", True, 0.5, "WinoGrande"),
        Task("kfuse_commonsense_qa", "acc", True, 0.2, "CommonsenseQA"),
        Task("kfuse_social_iqa", "acc", True, 1 / 3, "Social IQa"),
    ),
    datasets=(*FIVE.datasets, "piqa", "winogrande", "commonsense_qa", "social_iqa"),
    reference="lm-eval 0.4.13, stock tasks",
)
