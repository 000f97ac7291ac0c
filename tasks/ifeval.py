"""IFEval: 541 instructions whose following programs can check (2311.07911), asked as chat.

Task, checks and metrics are lm-eval's own `ifeval`, greedily with at most 1,280 tokens. A model
without a chat template reads the instruction as plain text. The score is the share of prompts of
which every instruction is followed, strictly; shares of instructions, and those of the loose
reading, stand in the notes. The checks need `pip install -e '.[ifeval]'` and NLTK's "punkt_tab".
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="ifeval",
    title="IFEval, strict",
    tasks=(Task("ifeval", "prompt_level_strict_acc", True, None, "prompts"),),
    datasets=("ifeval",),
    reference="IFEval 2311.07911",
    chat=True,
    stock="ifeval/ifeval.yaml",
    splits=(("train", "ifeval"),),
    needs=("nltk", "langdetect", "immutabledict"),
)
