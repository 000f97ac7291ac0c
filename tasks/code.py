"""Python functions to complete, judged by running their tests: pass@1 of one greedy completion.

HumanEval's 164 problems (2107.03374). FuseLLM's code column is MultiPL-E, the same problems in
other
languages and sampled, so this is near it but is not it. Completions are stored first and executed
later, in harness's sandbox; lm-eval's own helper would execute code as soon as it is imported and
is not used. It departs from lm-eval in two ways: at most 256 tokens are generated, and a line that
closes a code fence ends a completion, too.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="code",
    title="Code",
    tasks=(Task("kfuse_humaneval", "pass@1", True, None, "HumanEval"),),
    executes_code=True,
    datasets=("humaneval",),
    reference="HumanEval 2107.03374",
)
