"""Answers in free text: the five tasks of FuseLLM's table of generation, each on its own scale.

TriviaQA (exact match), DROP (exact match; F1 beside it), LAMBADA (the last word), IWSLT 2017 from
English to German (BLEU of the whole corpus) and SciBench (a number within 5 %). Greedy, without
examples, without a chat template. The paper's table prints no average, and there is none here: a
share of right answers and a BLEU have no common unit. So every task is reported, compared and
corrected for as a suite of its own, `generation@fusellm/TASK`.

Relative to the paper (FuseLLM 2401.10491, table 8): it names OpenCompass as the harness and neither
its version nor prompts, shots, subsets or metrics, so no number here is compared with a printed
one. What it leaves open is chosen so:

- TriviaQA, DROP, IWSLT: prompt and stops of lm-eval's stock tasks (triviaqa 3.0, drop 3.0, the
  translation tasks), of TriviaQA at most 50 tokens. A full stop ends an answer of TriviaQA and DROP
  also inside a name or a number, as there. Right is what the sets' authors call right; lm-eval's
  TriviaQA keeps articles instead.
- LAMBADA is generated, as the other four are, and not scored by likelihood as in lm-eval: the
  passage goes on for at most 16 tokens, and its first word counts.
- IWSLT is tst2017 (1,138 segments, what sacrebleu calls iwslt17), from English to German, which is
  OpenCompass's direction. BLEU is sacrebleu's with its defaults; its signature is in the protocol.
- SciBench has its 580 problems without worked solutions, weighed alike whatever the textbook, in
  the words of its authors without instructions; a power of ten in the unit goes into the number.
  Four gold numbers with a comma or a long minus, which their scorer cannot read, are read here.

Questions come from a local folder (--data), the first three also from the hub; a folder may hold a
part of TriviaQA (7,993 of 17,944) and of DROP (1,000 of 9,536), which reports then call partial.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="generation@fusellm",
    title="Generation (FuseLLM)",
    tasks=(
        Task("kfuse_triviaqa", "exact_match", True, None, "TriviaQA", filter="remove_whitespace"),
        Task("kfuse_drop", "exact_match", True, None, "DROP"),
        Task("kfuse_lambada", "exact_match", True, None, "LAMBADA", filter="first-word"),
        Task("kfuse_iwslt2017", "bleu", True, None, "IWSLT2017"),
        Task("kfuse_scibench", "acc", True, None, "SciBench", filter="number"),
    ),
    rule="apart",
    datasets=("triviaqa", "drop", "lambada", "iwslt2017", "scibench"),
    reference="FuseLLM 2401.10491, table 8",
)
