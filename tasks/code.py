"""Python functions to write, judged by running their tests: pass@1 of one greedy completion.

HumanEval's 164 problems (2107.03374), a function's head to complete, and MBPP's 500 (2108.07732),
three solved problems before each. FuseLLM's code column is MultiPL-E, HumanEval's problems in ten
languages and sampled, so this is near it but is not it; that is `multipl_e@fusellm`. Completions
are stored first and executed later, in harness's sandbox; lm-eval's own helpers would execute code
as soon as they are imported and are not used. HumanEval departs from lm-eval in two ways: at most
256 tokens are generated, and a line that closes a code fence ends a completion, too. MBPP departs
in one: what a problem's tests set up is set up, without which task 367 cannot be solved.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="code",
    title="Code",
    tasks=(
        Task("kfuse_humaneval", "pass@1", True, None, "HumanEval"),
        Task("kfuse_mbpp", "pass@1", True, None, "MBPP", shots=3),
    ),
    executes_code=True,
    datasets=("humaneval", "mbpp"),
    reference="HumanEval 2107.03374, MBPP 2108.07732",
)
