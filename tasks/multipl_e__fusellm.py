"""HumanEval's problems in ten languages, judged by running their tests: pass@1 of 20 samples.

Mirrors the code table of FuseLLM (2401.10491), made with MultiPL-E (2208.08227) in
bigcode-evaluation-harness; the unweighted mean over languages, clustered by problem, as the same
problem in all languages is one. The paper names neither the number of samples nor temperature,
top_p or length: 20, 0.2, 0.95 and 512 tokens are that harness's customary ones, and a choice.

It departs from the paper where its numbers are known to mislead: the published harness of that time
passed every Go program that it could save, so Go, and with it the paper's average of ten, must not
be compared; `without` names the language that a second average leaves out. Java needs the library
javatuples, and a language that cannot be judged here has no score instead of 0.
"""

from tasks.suite import Suite, Task

LANGUAGES = {
    "cpp": "C++",
    "go": "Go",
    "java": "Java",
    "js": "JavaScript",
    "php": "PHP",
    "py": "Python",
    "r": "R",
    "rb": "Ruby",
    "rs": "Rust",
    "ts": "TypeScript",
}

SUITE = Suite(
    name="multipl_e@fusellm",
    title="MultiPL-E (FuseLLM)",
    tasks=tuple(
        Task(f"kfuse_multipl_e_{key}", "pass@1", True, None, title)
        for key, title in LANGUAGES.items()
    ),
    executes_code=True,
    datasets=tuple(f"multipl_e_{key}" for key in LANGUAGES),
    without=("kfuse_multipl_e_go",),
    reference="FuseLLM 2401.10491, code generation benchmark",
)
