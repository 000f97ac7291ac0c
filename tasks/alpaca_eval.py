"""AlpacaEval 2: 805 instructions; how often a judge prefers the answer to GPT-4's, at equal length.

The model answers by its own chat template, greedily with at most 1,024 tokens. Both orders of the
two answers are judged; where the order turns the verdict, neither is preferred. The score is the
length-controlled win rate (`reports/corpus.py`); the plain one stands in the notes.

Relative to the paper (2404.04475) and its code: a verdict in words in place of the likelihoods of
two letters, both orders in place of one drawn, and no term for an instruction's difficulty.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="alpaca_eval",
    title="AlpacaEval 2, length-controlled",
    tasks=(Task("kfuse_alpaca_eval", "lc_win_rate", True, None, "instructions"),),
    judged="preference",
    datasets=("alpaca_eval",),
    reference="AlpacaEval 2 2404.04475",
)
