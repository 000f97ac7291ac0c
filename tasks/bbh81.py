"""The 81 solved exemplars of BIG-Bench Hard as questions: 27 tasks, 3 each, chain of thought.

Each exemplar is asked once, with the other two of its task as shots, so no question sees its own
solution. The prompt is that of lm-eval's `bbh_cot_fewshot` with one shot less. It resembles the BBH
column of FuseLLM (2401.10491) and must not be compared with it: other questions, 81 instead of
6,511, two shots instead of three, and one to three questions decide a task's score.

It departs from lm-eval's stock task where that is known to mislead: generation stops at a blank
line and not at a capital Q, at most 256 tokens are generated, and the answer loses only a final
period instead of its last character whatever that is. Comparison is exact, case-sensitive.
"""

from tasks.suite import Suite, Task

NAMES = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)

SUITE = Suite(
    name="bbh81",
    title="BBH-81",
    tasks=tuple(
        Task(
            f"kfuse_bbh81_{name}",
            "exact_match",
            True,
            None,
            name.replace("_", " "),
            filter="get-answer",
            shots=2,
        )
        for name in NAMES
    ),
    reference="BIG-Bench Hard 2210.09261, its chain-of-thought exemplars only",
)
