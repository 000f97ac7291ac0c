"""Programming languages: how a program is put together, built, run, and known to be judged.

A table that `harness.execution` reads. The programs have MultiPL-E's form (2208.08227): prompt,
completion and tests in one file. A print of a secret word is put behind the last test, inside
`main` where there is one, and only a program that prints the word last and ends with status 0
passes: leaving early with status 0, closing PHP's tag, or Ruby's `__END__` do not. The word is part
of the program, so one that searches its own file or image for the word can still deceive.

*Relative to the published harness*: Go's programs are `_test.go` files, of which the test binary
that `go test -c` builds is run; there, until April 2024, they were saved under another name, `go
test` found no test and all passed. `go vet` is not run. PHP's, Ruby's and R's exit status is
not trusted alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fusion.errors import RunError
from harness.sandbox import Limits

ROOMY = Limits(
    wall_seconds=30.0,
    cpu_seconds=15,
    limit_address_space=False,  # compilers share the folder with the program; `bounded` limits that
    processes=128,
    file_bytes=64 << 20,
    disk_bytes=256 << 20,
)
JAVATUPLES = "/usr/share/java/javatuples.jar"


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """How programs of one language are judged.

    build, run: shell commands in the program's folder. print_: the statement that prints the word
    {nonce}; it stands before the last `closing` braces of the tests, or at the end if that is 0.
    wrong: what a failed assertion writes. canary: prompt and tests of a function that adds one;
    bodies: completions of it with the outcome that each must have.
    """

    title: str
    source: str
    version: tuple[str, ...]
    build: str = ""
    run: str
    print_: str
    closing: int = 0
    wrong: str
    bounded: bool = True  # whether the runtime bears a limit of its address space
    needs: Mapping[str, str] = field(default_factory=dict)  # file → how to get it
    environment: Mapping[str, str] = field(default_factory=dict)
    canary: tuple[str, str]
    bodies: tuple[tuple[str, str], ...]
    package: str  # of Debian, where it can be had

    @property
    def limits(self) -> Limits:
        """The least a program is allowed; a slow machine gets more (`execution.fitness`)."""
        return ROOMY if self.build else replace(ROOMY, wall_seconds=15.0, cpu_seconds=5)


def key(language: str) -> str:
    """The key in LANGUAGES of a data set's word for a language; KeyError if there is none."""
    found = {"go_test.go": "go", "python": "py"}.get(language, language)
    if found not in (*LANGUAGES, "py"):
        raise KeyError(language)
    return found


def lay(language: Language, head: str, tests: str, nonce: str) -> dict[str, str | bytes]:
    """The files of one program, `judge.sh` among them, which builds and runs it.

    head: prompt and completion. RunError if the tests do not end as the language's do.
    """
    tests = tests.rstrip()
    ending = re.search(rf"(?:\}}\s*){{{language.closing}}}$", tests) if language.closing else None
    if language.closing and ending is None:
        raise RunError(
            f"{language.title}: the tests do not end with {language.closing} closing braces, so it "
            f"cannot be known that all were run; they end with {tests[-40:]!r}"
        )
    place = ending.start() if ending else len(tests)
    print_ = language.print_.replace("{nonce}", nonce)
    program = f"{head}\n{tests[:place]}\n{print_}\n{tests[place:]}\n"
    texts = {language.source: program, "judge.sh": _script(language)}
    if language.title == "Go":
        texts["nonce_test.go"] = _go_main(head, nonce)
    return {name: text.encode(errors="replace") for name, text in texts.items()}


def _script(language: Language) -> str:
    """Build, with status 103 if that fails and the signal that ended it if one did; then run.

    The compilers have the sandbox's limits; the program also one of its address space.
    """
    lines = []
    if language.build:
        lines += [
            f"{{ {language.build} ; }} > build.log 2>&1",
            "status=$?",
            "if [ $status -gt 128 ]; then kill -$((status - 128)) $$; fi",
            "if [ $status -ne 0 ]; then head -c 20000 build.log >&2; exit 103; fi",
        ]
    if language.bounded:
        lines.append(f"ulimit -v {ROOMY.memory_bytes >> 10}")
    return "\n".join([*lines, f"exec {language.run}", ""])


def _go_main(head: str, nonce: str) -> str:
    """What runs Go's tests, and prints the word if the test function came to its last line."""
    package = re.search(r"^package (\w+)", head, re.MULTILINE)
    return (
        f"package {package[1] if package else 'main'}\n"
        'import (\n\t"os"\n\t"testing"\n)\n'
        "var kfuseJudged bool\n"
        "func TestMain(m *testing.M) {\n"
        "\tcode := m.Run()\n"
        f'\tif code == 0 && kfuseJudged {{ os.Stdout.WriteString("\\n{nonce}\\n") }}\n'
        "\tos.Exit(code)\n}\n"
    )


_NODE_TESTS = (
    "const assert = require('node:assert');\n"
    "function test() {\n  assert.deepEqual(successor(1), 2);\n"
    "  assert.deepEqual(successor(-1), 0);\n}\ntest();"
)
_NODE_PRINT = (
    r"""require('node:fs').writeSync(1, "\n{nonce}\n"); require('node:process').exit(0);"""
)
_BRACES = ("    return n + 1;\n", "    return n;\n", "    while (true) {}\n")
_MEANING = ("pass", "wrong", "timeout", "exception", "compile")


def _bodies(*completions: str) -> tuple[tuple[str, str], ...]:
    """Good, bad, looping, leaving early with status 0, and, where there is a compiler, broken."""
    return tuple(zip(completions, _MEANING, strict=False))


LANGUAGES: dict[str, Language] = {
    "cpp": Language(
        title="C++",
        source="program.cpp",
        version=("g++", "--version"),
        build="g++ -std=c++17 program.cpp -o program",
        run="./program",
        print_=r'    std::printf("\n{nonce}\n"); std::fflush(stdout); std::_Exit(0);',
        closing=1,
        wrong=r"Assertion .* failed",
        canary=(
            "#include<assert.h>\n#include<bits/stdc++.h>\nlong successor(long n) {\n",
            "}\nint main() {\n    assert(successor(1) == 2);\n    assert(successor(-1) == 0);\n}\n",
        ),
        bodies=_bodies(
            *_BRACES[:2],
            "    for (volatile int i = 0;; i = 1) {}\n",
            "    std::exit(0);\n",
            "    return (\n",
        ),
        package="g++",
    ),
    "go": Language(
        title="Go",
        source="program_test.go",
        version=("go", "version"),
        build="go test -c -vet=off -o program program_test.go nonce_test.go",
        run="./program",
        print_="\tkfuseJudged = !t.Failed()",
        closing=1,
        wrong=r"(?s)\A(?!.*^panic:).*--- FAIL",
        bounded=False,
        environment={
            "GOCACHE": "/tmp/.cache",
            "GO111MODULE": "off",
            "CGO_ENABLED": "0",
            "GOTOOLCHAIN": "local",
            "GOTELEMETRY": "off",
            "GOMEMLIMIT": "1GiB",
        },
        canary=(
            'package successor_test\n\nimport (\n    "testing"\n    "fmt"\n    "os"\n)\n\n'
            "var _ = os.Args\nfunc successor(n int) int {\n",
            "func TestSuccessor(t *testing.T) {\n"
            "\tfor n, want := range map[int]int{1: 2, -1: 0} {\n"
            '\t\tif fmt.Sprintf("%v", successor(n)) != fmt.Sprintf("%v", want) {\n'
            '\t\t\tt.Errorf("successor of %d", n)\n\t\t}\n\t}\n}\n',
        ),
        bodies=_bodies(
            "    return n + 1\n}\n",
            "    return n\n}\n",
            "    for {}\n}\n",
            "    defer fmt.Print()\n    os.Exit(0)\n    return n + 1\n}\n",
            "    return (\n}\n",
        ),
        package="golang-go",
    ),
    "java": Language(
        title="Java",
        source="Problem.java",
        version=("javac", "-version"),
        build=f"javac -J-Xmx512m -encoding UTF8 -cp {JAVATUPLES} -d . Problem.java",
        run=f"java -ea -Xmx1g -XX:+UseSerialGC -cp .:{JAVATUPLES} Problem",
        print_='    System.out.print("\\n{nonce}\\n");\n'
        "    System.out.flush(); Runtime.getRuntime().halt(0);",
        closing=2,
        wrong=r"java\.lang\.AssertionError",
        bounded=False,
        needs={JAVATUPLES: "libjavatuples-java"},
        canary=(
            "import org.javatuples.*;\nclass Problem {\n"
            "    public static long successor(long n) {\n",
            "    }\n    public static void main(String[] args) {\n"
            "    assert(successor(1) == 2);\n    assert(successor(-1) == 0);\n    }\n\n}\n",
        ),
        bodies=_bodies(
            *_BRACES,
            "    System.exit(0); return new Pair<Long, Long>(n, n).getValue0();\n",
            "    return (\n",
        ),
        package="default-jdk-headless libjavatuples-java",
    ),
    "js": Language(
        title="JavaScript",
        source="program.js",
        version=("node", "--version"),
        run="node --max-old-space-size=1024 program.js",
        print_=_NODE_PRINT,
        wrong="AssertionError",
        bounded=False,
        canary=("function successor(n){\n", _NODE_TESTS),
        bodies=_bodies(*(f"{body}}}\n" for body in (*_BRACES, "    process.exit(0);\n"))),
        package="nodejs",
    ),
    "php": Language(
        title="PHP",
        source="program.php",
        version=("php", "--version"),
        run="php -d display_errors=stderr -d memory_limit=1G program.php",
        print_=r'fwrite(STDOUT, "\n{nonce}\n"); exit(0);',
        wrong=r"Uncaught Exception: Test failed!",
        canary=(
            "<?php\nfunction successor($n) {\n",
            'function test(): void {\n    if (successor(1) !== 2) { throw new Exception("Test '
            'failed!"); }\n    if (successor(-1) !== 0) { throw new Exception("Test failed!"); }\n'
            "}\n\ntest();",
        ),
        bodies=_bodies(
            "    return $n + 1;\n}\n",
            "    return $n;\n}\n",
            "    while (true) {}\n}\n",
            "    exit(0);\n}\n",
        ),
        package="php-cli",
    ),
    "r": Language(
        title="R",
        source="program.r",
        version=("Rscript", "--version"),
        run="Rscript --vanilla program.r",
        print_=r'cat("\n{nonce}\n"); quit(save = "no", status = 0, runLast = FALSE)',
        wrong="(is|are) not (all )?TRUE",
        canary=(
            "successor <- function(n) {\n",
            "test_humaneval <- function() {\n    stopifnot(isTRUE(all.equal(successor(1), 2)))\n"
            "    stopifnot(isTRUE(all.equal(successor(-1), 0)))\n}\ntest_humaneval()",
        ),
        bodies=_bodies(
            "    return(n + 1)\n}\n",
            "    return(n)\n}\n",
            "    while (TRUE) {}\n}\n",
            "    quit(save = 'no', status = 0)\n}\n",
        ),
        package="r-base-core",
    ),
    "rb": Language(
        title="Ruby",
        source="program.rb",
        version=("ruby", "--version"),
        run="ruby program.rb",
        print_=(
            "Test::Unit::AutoRunner.need_auto_run = false\n"
            "kfuse_passed = Test::Unit::AutoRunner.run\nSTDOUT.flush\n"
            r'STDOUT.syswrite("\n{nonce}\n") if kfuse_passed'
            "\nexit!(kfuse_passed ? 0 : 1)"
        ),
        wrong=r"(?s)\A(?!.*^Error:).*^Failure:",
        canary=(
            "def successor(n)\n",
            "require 'test/unit'\nclass TestHumanEval < Test::Unit::TestCase\n"
            "  def test_successor\n    assert_equal(2, successor(1))\n"
            "    assert_equal(0, successor(-1))\n  end\nend\n",
        ),
        bodies=_bodies(
            "  n + 1\nend\n",
            "  n\nend\n",
            "  loop {}\nend\n",
            "  exit(0)\nend\n",
        ),
        package="ruby ruby-test-unit",
    ),
    "rs": Language(
        title="Rust",
        source="program.rs",
        version=("rustc", "--version"),
        build="rustc program.rs -o program",
        run="./program",
        print_=r'    println!("\n{nonce}"); std::process::exit(0);',
        closing=1,
        wrong="assertion failed|assertion `left == right` failed",
        canary=(
            "fn successor(n: isize) -> isize {\n",
            "}\n\nfn main() {\n    assert_eq!(successor(1), 2);\n"
            "    assert_eq!(successor(-1), 0);\n}\n",
        ),
        bodies=_bodies(
            *_BRACES[:2],
            "    loop {}\n",
            "    std::process::exit(0)\n",
            "    return (\n",
        ),
        package="rustc",
    ),
    "ts": Language(
        title="TypeScript",
        source="program.ts",
        version=("tsc", "--version"),
        build="tsc --target es2020 --skipLibCheck program.ts",
        run="node --max-old-space-size=1024 program.js",
        print_=_NODE_PRINT,
        wrong="AssertionError",
        bounded=False,
        canary=(
            "function successor(n: number): number {\n",
            f"declare var require: any;\n{_NODE_TESTS}",
        ),
        bodies=_bodies(
            *(f"{body}}}\n" for body in _BRACES),
            "    require('node:process').exit(0); return n + 1;\n}\n",
            "    return 'text';\n}\n",
        ),
        package="node-typescript",
    ),
}
