"""Ten languages for real: right programs pass, wrong ones do not, and no program that skips its
tests passes.

Every language is tried on all five problems where nothing must be compiled, else on one of its own;
KFUSE_ALL_PROGRAMS=1 tries all of them.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from fusion.errors import RunError
from harness import execution
from harness.execution import execute, fitness, summarise
from harness.languages import LANGUAGES, key, lay
from harness.sandbox import choose, run

# Functions of two whole numbers: name, two calls with their values, and bodies in five grammars:
# C's (also PHP's, with $), Go's and Rust's, Python's, Ruby's, R's. The bad one replaces a part.
PROBLEMS: dict[str, tuple[tuple[tuple[int, int, int], ...], dict[str, str], tuple[str, str]]] = {
    "add": (
        ((2, 3, 5), (0, -4, -4)),
        {"c": "return a + b;", "go": "return a + b;", "py": "return a + b", "rb": "a + b",
         "r": "return(a + b)"},
        ("+", "-"),
    ),
    "larger": (
        ((2, 3, 3), (7, -4, 7)),
        {"c": "if (a > b) return a; return b;", "go": "if a > b { return a; }; return b;",
         "py": "return a if a > b else b", "rb": "if a > b then a else b end",
         "r": "if (a > b) return(a)\n  return(b)"},
        (">", "<"),
    ),
    "gcd": (
        ((12, 18, 6), (7, 3, 1)),
        {"c": "if (b == 0) return a; return gcd(b, a % b);",
         "go": "if b == 0 { return a; }; return gcd(b, a % b);",
         "py": "return a if b == 0 else gcd(b, a % b)",
         "rb": "if b == 0 then a else gcd(b, a % b) end",
         "r": "if (b == 0) return(a)\n  return(gcd(b, a %% b))"},
        ("gcd(b, ", "gcd(a, "),
    ),
    "power": (
        ((2, 10, 1024), (3, 0, 1)),
        {"c": "if (b == 0) return 1; return a * power(a, b - 1);",
         "go": "if b == 0 { return 1; }; return a * power(a, b - 1);",
         "py": "return 1 if b == 0 else a * power(a, b - 1)",
         "rb": "if b == 0 then 1 else a * power(a, b - 1) end",
         "r": "if (b == 0) return(1)\n  return(a * power(a, b - 1))"},
        ("a *", "a +"),
    ),
    "total": (
        ((1, 4, 10), (5, 4, 0)),
        {"c": "if (a > b) return 0; return a + total(a + 1, b);",
         "go": "if a > b { return 0; }; return a + total(a + 1, b);",
         "py": "return 0 if a > b else a + total(a + 1, b)",
         "rb": "if a > b then 0 else a + total(a + 1, b) end",
         "r": "if (a > b) return(0)\n  return(a + total(a + 1, b))"},
        ("a + 1", "a + 2"),
    ),
}  # fmt: skip

GRAMMAR = {"go": "go", "rs": "go", "py": "py", "rb": "rb", "r": "r"}  # C's for the others
HEADS = {
    "cpp": "#include<assert.h>\n#include<bits/stdc++.h>\nlong NAME(long a, long b) {\n",
    "go": 'package NAME_test\n\nimport (\n    "testing"\n    "fmt"\n)\n\n'
    "func NAME(a int, b int) int {\n",
    "java": "import java.util.*;\nimport org.javatuples.*;\nclass Problem {\n"
    "    public static long NAME(long a, long b) {\n",
    "js": "function NAME(a, b){\n",
    "php": "<?php\nfunction NAME($a, $b) {\n",
    "py": "def NAME(a, b):\n    ",
    "r": "NAME <- function(a, b) {\n  ",
    "rb": "def NAME(a, b)\n  ",
    "rs": "fn NAME(a: isize, b: isize) -> isize {\n",
    "ts": "function NAME(a: number, b: number): number {\n",
}
CLOSED = {"cpp": "", "java": "", "rs": "", "py": "\n", "rb": "\nend\n"}  # else a brace
CHECKS = {
    "cpp": "    assert(NAME(A, B) == C);\n",
    "go": '\tif fmt.Sprintf("%v", NAME(A, B)) != "C" { t.Errorf("not C") }\n',
    "java": "    assert(NAME(A, B) == C);\n",
    "js": "  assert.deepEqual(NAME(A, B), C);\n",
    "php": '    if (NAME(A, B) !== C) { throw new Exception("Test failed!"); }\n',
    "py": "    assert candidate(A, B) == C\n",
    "r": "    stopifnot(isTRUE(all.equal(NAME(A, B), C)))\n",
    "rb": "    assert_equal(C, NAME(A, B))\n",
    "rs": "    assert_eq!(NAME(A, B), C);\n",
    "ts": "  assert.deepEqual(NAME(A, B), C);\n",
}
AROUND = {
    "cpp": ("}\nint main() {\n", "}\n"),
    "go": ("func TestIt(t *testing.T) {\n", "}\n"),
    "java": ("    }\n    public static void main(String[] args) {\n", "    }\n\n}\n"),
    "js": ("const assert = require('node:assert');\nfunction test() {\n", "}\n\ntest();"),
    "php": ("function test(): void {\n", "}\n\ntest();"),
    "py": ("def check(candidate):\n", "\ncheck(NAME)\n"),
    "r": ("test_humaneval <- function() {\n", "}\ntest_humaneval()"),
    "rb": (
        "require 'test/unit'\nclass TestHumanEval < Test::Unit::TestCase\n  def test_it\n",
        "  end\nend\n",
    ),
    "rs": ("}\n\nfn main() {\n", "}\n"),
    "ts": (
        "declare var require: any;\nconst assert = require('node:assert');\nfunction test() {\n",
        "}\n\ntest();",
    ),
}
COMPILED = [language for language, spoken in LANGUAGES.items() if spoken.build]
PAIRS = [
    (language, problem)
    for language in HEADS
    for number, problem in enumerate(PROBLEMS)
    if language not in COMPILED
    or number == COMPILED.index(language)
    or os.environ.get("KFUSE_ALL_PROGRAMS") == "1"
]


def fit(language: str) -> None:
    """Skip where this machine has no toolchain; a toolchain that misjudges is a failure."""
    reason = fitness(language, choose()).reason
    if reason and reason.startswith("no "):
        pytest.skip(reason)
    assert reason is None


def written(language: str, problem: str) -> tuple[dict[str, Any], str, str]:
    """A problem in MultiPL-E's form, a good completion and a bad one."""
    calls, bodies, (old, new) = PROBLEMS[problem]
    body = bodies[GRAMMAR.get(language, "c")]
    bad = body.replace(old, new)
    assert bad != body
    if language == "php":
        body, bad = (re.sub(r"\b([ab])\b", r"$\1", text) for text in (body, bad))
    checks = ""
    for a, b, c in calls:
        values = {"A": str(a), "B": str(b), "C": str(c), "NAME": problem}
        checks += re.sub(r"\b(A|B|C|NAME)\b", lambda m, v=values: v[m[0]], CHECKS[language])
    before, after = AROUND[language]
    document = {
        "language": "go_test.go" if language == "go" else language,
        "prompt": HEADS[language].replace("NAME", problem),
        "tests": before + checks + after.replace("NAME", problem),
    }
    closed = CLOSED.get(language, "\n}\n")
    return document, body + closed, bad + closed


@pytest.mark.parametrize(("language", "problem"), PAIRS)
def test_the_good_program_passes_and_the_bad_one_is_wrong(language: str, problem: str) -> None:
    fit(language)
    document, good, bad = written(language, problem)
    assert execute([{"generation": [good, bad], "doc": document}], allow=True) == [
        ["pass", "wrong"]
    ]


# Ends with status 0 and never comes to its tests, in the language's own way.
EVASIONS = {
    "php": "return $a + $b;\n}\n?>\n",
    "rb": "a + b\nend\n__END__\n",
    "js": "return a + b;\n}\nprocess.exit(0);\n",
    "r": "return(a + b)\n}\nquit(status = 0)\n",
    "py": "return a + b\nraise SystemExit(0)\n",
    "go": "return a + b\n}\nfunc init() { os.Exit(0) }\n",
}


@pytest.mark.parametrize("language", EVASIONS)
def test_a_program_that_skips_its_tests_does_not_pass(language: str) -> None:
    fit(language)
    document, _, _ = written(language, "add")
    if language == "go":
        document["prompt"] = document["prompt"].replace('"fmt"', '"fmt"\n    "os"')
    ((outcome,),) = execute([{"generation": [EVASIONS[language]], "doc": document}], allow=True)
    assert outcome == "exception"


def test_go_is_built_from_test_files_and_tests_that_did_not_run_do_not_pass() -> None:
    fit("go")
    assert LANGUAGES["go"].source.endswith("_test.go")
    document, good, _ = written("go", "add")
    document["tests"] = document["tests"].replace("TestIt(t *testing.T)", "notATest(t *testing.T)")
    assert execute([{"generation": [good], "doc": document}], allow=True) == [["exception"]]


def test_a_missing_toolchain_is_infra_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dataclasses import replace

    absent = replace(LANGUAGES["rb"], version=("no-such-ruby", "--version"))
    monkeypatch.setitem(execution.LANGUAGES, "rb", absent)
    fitness.cache_clear()
    try:
        document, good, _ = written("rb", "add")
        python, right, _ = written("py", "add")
        records = [{"generation": [good] * 2, "doc": document}]
        records.append({"generation": [right], "doc": python})
        assert execute(records, allow=True) == [["infra", "infra"], ["pass"]]
    finally:
        fitness.cache_clear()
    assert "no-such-ruby" in caplog.text
    assert "Debian has it in ruby" in caplog.text


def test_a_toolchain_that_passes_everything_judges_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dataclasses import replace

    # Finds the word in the program and says it, whatever the program does.
    lying = """sh -c 'echo; grep -oE "[0-9a-f]{32}" program.php'"""
    version = ("sh", "-c", "echo 8.2.0")
    monkeypatch.setitem(
        execution.LANGUAGES, "php", replace(LANGUAGES["php"], run=lying, version=version)
    )
    fitness.cache_clear()
    try:
        document, good, bad = written("php", "add")
        nonce = "0123456789abcdef" * 2
        laid = lay(LANGUAGES["php"], document["prompt"] + bad, document["tests"], nonce)
        said = run(["/bin/sh", "judge.sh"], laid, LANGUAGES["php"].limits)
        assert execution.verdict(said, nonce) == "pass", "the lie itself must work"
        found = execute([{"generation": [good, bad], "doc": document}], allow=True)
    finally:
        fitness.cache_clear()
    assert found == [["infra", "infra"]]
    assert "the canary that must end as 'wrong' ended as 'pass'" in caplog.text


def test_a_missing_library_is_infra(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    absent = replace(LANGUAGES["java"], needs={"/no/such.jar": "libjavatuples-java"})
    monkeypatch.setitem(execution.LANGUAGES, "java", absent)
    fitness.cache_clear()
    try:
        assert (fitness("java", choose()).reason or "").startswith("no /no/such.jar")
    finally:
        fitness.cache_clear()


def test_limits_grow_with_the_good_canary_and_never_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, *range(10, 40)])
    answers = iter(expected for _, expected in LANGUAGES["php"].bodies)
    monkeypatch.setattr(execution.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(execution, "judge", lambda *_: next(answers))
    found = execution._canaries("php", "8", choose())
    assert found.reason is None
    assert found.seconds == 9.0
    assert (found.limits.wall_seconds, found.limits.cpu_seconds) == (90.0, 45)


def test_mbpp_sets_up_before_its_tests_and_after_the_program() -> None:
    document = {"prompt": "text", "tests": ["assert f(box) == 3"], "setup": "box = Box(3)"}
    good = "class Box:\n    def __init__(self, n): self.n = n\ndef f(box):\n    return box.n\n"
    bad = good.replace("box.n", "0")
    assert execute([{"generation": [good, bad, "def f(:"], "doc": document}], allow=True) == [
        ["pass", "wrong", "compile"]
    ]


def test_tests_without_an_end_are_refused() -> None:
    with pytest.raises(RunError, match="do not end with 2 closing braces"):
        lay(LANGUAGES["java"], "class Problem {", "    }\n", "word")


@pytest.mark.parametrize("language", ["cobol", ""])
def test_an_unknown_language_is_named(language: str) -> None:
    document = {"prompt": "", "tests": "", "language": language}
    with pytest.raises(RunError, match=f"language '{language}' is unknown; known: cpp, go"):
        execute([{"generation": ["x"], "doc": document}], allow=True)


def test_words_of_the_data_name_their_languages() -> None:
    assert [key(word) for word in ("go_test.go", "python", "py", "ts")] == ["go", "py", "py", "ts"]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["pass"], (1.0, "pass", None)),
        (["wrong"], (0.0, "wrong", None)),
        (["pass", "wrong", "wrong", "timeout"], (0.25, "wrong", "pass 1, wrong 2, timeout 1")),
        (["pass", "infra", "wrong"], (0.5, "infra", "pass 1, wrong 1, infra 1")),
    ],
)
def test_samples_become_a_share_of_the_judged(outcomes: list[str], expected: Any) -> None:
    assert summarise(outcomes) == expected


def test_a_problem_that_nothing_judged_has_no_score() -> None:
    value, word, _ = summarise(["infra", "infra"])
    assert value != value
    assert word == "infra"
