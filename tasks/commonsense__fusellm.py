"""Commonsense and science questions with given choices, scored by log-likelihood, without shots.

Mirrors the common-sense table of FuseLLM (2401.10491): ARC-easy, ARC-challenge, BoolQ, HellaSwag
and OpenBookQA, an unweighted mean over the five. Prompts, choices and metrics are those of
lm-eval's stock tasks, character by character. ARC and OpenBookQA use the test split, BoolQ and
HellaSwag the validation split, as lm-eval does. It departs from the paper in the version of lm-eval
(the paper's is 0.3.0).
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="commonsense@fusellm",
    title="Commonsense (FuseLLM)",
    tasks=(
        Task("kfuse_arc_easy", "acc_norm", True, 0.25, "ARC-e"),
        Task("kfuse_arc_challenge", "acc_norm", True, 0.25, "ARC-c"),
        Task("kfuse_boolq", "acc", True, 0.5, "BoolQ"),
        Task("kfuse_hellaswag", "acc_norm", True, 0.25, "HellaSwag"),
        Task("kfuse_openbookqa", "acc_norm", True, 0.25, "OpenBookQA"),
    ),
    datasets=("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa"),
    reference="FuseLLM 2401.10491, common-sense benchmark",
)
