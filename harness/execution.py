"""From stored generations to outcomes: put programs together, run them, say how each ended.

A pure function of records, repeatable without the model. Before the first program, canaries run: a
good one must pass, and a bad, a looping and an early-leaving one must fail in their own way, else
every outcome is `infra`: a machine that cannot judge must not count as a model that cannot code.

Outcomes: pass, wrong (a test failed), exception, compile, timeout, output_limit, infra.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from fusion.errors import RunError
from harness.sandbox import Limits, Result, run

_COMPILE = ("SyntaxError", "IndentationError", "TabError")
_CANARIES = {
    "pass": "def f(x):\n    return x + 1\n",
    "wrong": "def f(x):\n    return x\n",
    "timeout": "def f(x):\n    while True:\n        pass\n",
    "exception": "import os\nos._exit(0)\n",
}
_TEST = "def check(candidate):\n    assert candidate(1) == 2\n"


def program(prompt: str, completion: str, test: str, entry_point: str, nonce: str) -> str:
    """A completion with its tests; the nonce is printed only after every test has passed.

    Relative to the published harness (HumanEval, 2107.03374): there a program that leaves early
    with code 0 passes.
    """
    return f"{prompt}{completion}\n\n{test}\n\ncheck({entry_point})\nprint({nonce!r})\n"


def outcome(result: Result, nonce: str) -> str:
    """How a program ended, in one word."""
    if result.status in ("timeout", "output_limit"):
        return result.status
    lines = result.output.strip().splitlines()
    last = lines[-1] if lines else ""
    if result.status == "exited" and result.returncode == 0 and last == nonce:
        return "pass"
    name = last.split(":")[0].split(".")[-1]
    if name in _COMPILE:
        return "compile"
    return "wrong" if name == "AssertionError" else "exception"


def judge(completion: str, document: Mapping[str, Any], limits: Limits) -> str:
    """Run one completion against its problem's tests."""
    # A nonce of its own for each program: it cannot be known, and an assertion cannot contain it.
    nonce = secrets.token_hex(16)
    text = program(document["prompt"], completion, document["test"], document["entry_point"], nonce)
    interpreter = str(Path(sys.executable).resolve())
    result = run([interpreter, "-I", "-S", "main.py"], {"main.py": text}, limits)
    return outcome(result, nonce)


@cache
def canaries(limits: Limits) -> str | None:
    """None if this machine judges rightly, else what it got wrong."""
    for expected, body in _CANARIES.items():
        document = {"prompt": "", "test": _TEST, "entry_point": "f"}
        short = Limits(seconds=min(2.0, limits.seconds)) if expected == "timeout" else limits
        found = judge(body, document, short)
        if found != expected:
            return f"the canary that must end as '{expected}' ended as '{found}'"
    return None


def execute(
    programs: Sequence[Mapping[str, Any]],
    *,
    allow: bool,
    workers: int | None = None,
    limits: Limits | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The outcome of each record's first generation, in order; timeouts get a second try alone.

    programs: records with `generation` and the problem as `doc` (prompt, test, entry_point).
    RunError unless allowed.
    """
    if not allow:
        raise RunError("generated code is only executed if the recipe allows it")
    limits = limits or Limits()
    wrong = canaries(limits)
    if wrong:
        return ["infra"] * len(programs)
    done = 0
    found: list[str] = []
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for result in pool.map(lambda p: judge(p["generation"][0], p["doc"], limits), programs):
            found.append(result)
            done += 1
            progress(done)
    for number, result in enumerate(found):
        if result == "timeout":
            found[number] = judge(
                programs[number]["generation"][0], programs[number]["doc"], limits
            )
    return found


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them right, hold a right one: 1 − C(n−c, k) / C(n, k).

    Unbiased (2107.03374, equation 1). ValueError unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
