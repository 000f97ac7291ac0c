"""Nine sets of questions with given choices, scored by log-likelihood, without shots.

The five of `commonsense@fusellm` (2401.10491), and PIQA, WinoGrande, CommonsenseQA and Social IQa
on their validation splits; an unweighted mean over the nine. Prompts, choices and metrics are those
of lm-eval's stock tasks, character by character: CommonsenseQA shows its choices and asks for the
letter, WinoGrande predicts what follows the gap.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="commonsense",
    title="Commonsense",
    tasks=(
        Task("kfuse_arc_easy", "acc_norm", True, 0.25, "ARC-e"),
        Task("kfuse_arc_challenge", "acc_norm", True, 0.25, "ARC-c"),
        Task("kfuse_boolq", "acc", True, 0.5, "BoolQ"),
        Task("kfuse_hellaswag", "acc_norm", True, 0.25, "HellaSwag"),
        Task("kfuse_openbookqa", "acc_norm", True, 0.25, "OpenBookQA"),
        Task("kfuse_piqa", "acc_norm", True, 0.5, "PIQA"),
        Task("kfuse_winogrande", "acc", True, 0.5, "WinoGrande"),
        Task("kfuse_commonsense_qa", "acc", True, 0.2, "CommonsenseQA"),
        Task("kfuse_social_iqa", "acc", True, 1 / 3, "Social IQa"),
    ),
    datasets=(
        "arc_easy",
        "arc_challenge",
        "boolq",
        "hellaswag",
        "openbookqa",
        "piqa",
        "winogrande",
        "commonsense_qa",
        "social_iqa",
    ),
    reference="lm-eval 0.4.13, stock tasks",
)
