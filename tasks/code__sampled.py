"""The problems of `code`, 20 samples each: pass@1, and pass@10 beside it.

Temperature 0.8 and top_p 0.95 are those of HumanEval's paper (2107.03374) for many samples; its
unbiased estimator, 1 − C(n − c, k) / C(n, k), is harness's. Everything else is as in
`code`, whose greedy pass@1 is another number: sampling moves it.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="code@sampled",
    title="Code, sampled",
    tasks=(
        Task("kfuse_humaneval_sampled", "pass@1", True, None, "HumanEval"),
        Task("kfuse_mbpp_sampled", "pass@1", True, None, "MBPP", shots=3),
    ),
    executes_code=True,
    datasets=("humaneval", "mbpp"),
    reference="HumanEval 2107.03374, MBPP 2108.07732",
)
