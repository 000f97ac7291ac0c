"""From stored generations to outcomes: assemble programs, run them in the sandbox, judge the ends.

A function of records and problems that needs no model, so it can be repeated; for Python problems
in the form of HumanEval (2107.03374). Before the first program canaries run: a good one must pass
and a bad, a raising, a broken, a looping, a flooding and an early-leaving one must each fail in
its own way, else every outcome is `infra`: a machine that cannot judge is not a model that cannot
code.

Outcomes: pass · wrong (an assertion failed) · exception (also memory, a crash, leaving before the
tests end) · compile (no Python at all) · timeout · output_limit · infra (not judged: no score).
Programs have the standard library alone, a fixed hash seed and a fixed seed of `random`. A program
that looks for the judge in its own process can deceive it; one that does not try cannot.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fusion.errors import RunError
from harness.sandbox import Limits, Outcome, interpreter, run

log = logging.getLogger(__name__)

OUTCOMES = ("pass", "wrong", "exception", "compile", "timeout", "output_limit", "infra")
WRONG, EXCEPTION, COMPILE = 101, 102, 103  # exit statuses of the judge

# Runs inside the sandbox. As in the published harness, the program runs in an empty namespace, so
# a `__main__` block does not. Leaving by os._exit ends what the program left running, too.
JUDGE = f"""
import os, random, sys
with open("nonce") as file:
    nonce = file.read()
os.unlink("nonce")
with open("program.py", encoding="utf-8") as file:
    source = file.read()
random.seed(0)
leave, write = os._exit, os.write  # kept, should the program change its modules
sys.path[:] = [p for p in sys.path if not p.endswith(("site-packages", "dist-packages"))]
try:
    code = compile(source, "program.py", "exec")
except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
    write(2, repr(error).encode(errors="replace"))
    leave({COMPILE})
try:
    exec(code, {{}})
except BaseException as error:
    ended = {WRONG} if isinstance(error, AssertionError) else {EXCEPTION}
    try:
        write(2, repr(error).encode(errors="replace"))
    finally:
        leave(ended)
try:
    sys.stdout.flush()
    sys.__stdout__.flush()
except BaseException:
    pass
write(1, b"\\n" + nonce.encode() + b"\\n")
leave(0)
"""

_DOCUMENT = {
    "prompt": "def successor(number):\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(-1) == 0\n",
    "entry_point": "successor",
}
CANARIES = (
    ("    return number + 1\n", "pass"),
    ("    return number\n", "wrong"),
    ("    return nothing\n", "exception"),
    ("    return (\n", "compile"),
    ("    while True:\n        pass\n", "timeout"),
    ("    while True:\n        print('x' * 9999)\n", "output_limit"),
    ("    raise SystemExit(0)\n", "exception"),
    ("    import os\n    os._exit(0)\n", "exception"),
)


def execute(
    records: Sequence[Mapping[str, Any]],
    *,
    allow: bool,
    workers: int | None = None,
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The outcome of each record's first generation, in the order of the records: pass@1.

    records: `generation`, a list of completions, and `doc`, with prompt, test and entry_point.
    The other arguments and errors are those of `execute_samples`.
    """
    first = [{**record, "generation": record["generation"][:1]} for record in records]
    found = execute_samples(first, allow=allow, workers=workers, limits=limits, progress=progress)
    return [outcomes[0] if outcomes else "infra" for outcomes in found]


def execute_samples(
    records: Sequence[Mapping[str, Any]],
    *,
    allow: bool,
    workers: int | None = None,
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """The outcome of every generation of every record.

    allow: the recipe's consent. workers: the machine's cores by default; changes no outcome but for
    programs at the edge of a limit, so timeouts are run once more, alone. progress: called with the
    number done. RunError without consent, or if a record lacks a part.
    """
    if allow is not True:
        raise RunError(
            "generated code was not executed: that needs `evaluate.allow_code_execution: true` in "
            "the recipe"
        )
    _check(records)
    limits = limits or Limits()
    programs = [(g, record["doc"]) for record in records for g in record["generation"]]
    if not programs:
        return [[] for _ in records]
    if reason := unfit():
        log.warning("no program was judged: %s", reason)
        return [["infra"] * len(record["generation"]) for record in records]
    found = iter(_run(programs, limits, workers or os.cpu_count() or 1, progress))
    return [[next(found) for _ in record["generation"]] for record in records]


def _check(records: Sequence[Mapping[str, Any]]) -> None:
    for number, record in enumerate(records):
        lacking = [name for name in ("generation", "doc") if name not in record]
        if not lacking:
            lacking = [f"doc.{n}" for n in _DOCUMENT if not isinstance(record["doc"].get(n), str)]
        if lacking:
            raise RunError(
                f"record {number} cannot be executed: it lacks {', '.join(lacking)}; needed are "
                "generation and doc with prompt, test and entry_point"
            )


def _run(
    programs: Sequence[tuple[str, Mapping[str, Any]]],
    limits: Limits,
    workers: int,
    progress: Callable[[int], None] | None,
) -> list[str]:
    found = ["infra"] * len(programs)
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = {pool.submit(judge, *p, limits): number for number, p in enumerate(programs)}
        for done, future in enumerate(as_completed(waiting), start=1):
            found[waiting[future]] = future.result()
            if progress:
                progress(done)
    finally:
        pool.shutdown(cancel_futures=True)
    for number, program in enumerate(programs):
        if found[number] == "timeout":
            found[number] = judge(*program, limits)
    return found


def judge(completion: str, document: Mapping[str, Any], limits: Limits) -> str:
    """Run one completion against its problem's tests; one of OUTCOMES."""
    nonce = secrets.token_hex(16)
    program = assemble(completion, document)
    files: dict[str, str | bytes] = {"judge.py": JUDGE, "program.py": program, "nonce": nonce}
    command = [interpreter(), "-P", "-s", "-B", "judge.py"]
    return verdict(run(command, files, limits, environment={"PYTHONHASHSEED": "0"}), nonce)


def assemble(completion: str, document: Mapping[str, Any]) -> bytes:
    """The program of one completion: its head, itself, the tests, and the call of the tests."""
    parts = document["prompt"] + completion, document["test"], f"check({document['entry_point']})"
    return ("\n".join(parts) + "\n").encode(errors="replace")


def verdict(outcome: Outcome, nonce: str) -> str:
    """The word for how a program ended; to pass it must have printed the nonce last of all.

    Relative to the published harness: there a program that leaves early with status 0 passes.
    """
    if outcome.ending in ("timeout", "output_limit", "infra"):
        return outcome.ending
    if outcome.ending != "exit":
        return "exception"
    if outcome.code == 0 and outcome.stdout.endswith(f"\n{nonce}\n"):
        return "pass"
    return {WRONG: "wrong", COMPILE: "compile"}.get(outcome.code, "exception")


@lru_cache(maxsize=1)
def unfit() -> str | None:
    """Why this machine cannot judge Python programs, or None if all canaries end as they must."""
    usual = Limits()
    short = replace(usual, cpu_seconds=1, wall_seconds=6.0)
    for body, expected in CANARIES:
        try:
            found = judge(body, _DOCUMENT, short if expected == "timeout" else usual)
        except (OSError, RunError) as error:
            return f"the sandbox cannot run a program: {error}"
        if found != expected:
            return f"the canary that must end as '{expected}' ended as '{found}':\n{body}"
    return None


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k samples drawn from n, of which c are right, hold a right one.

        pass@k = 1 − C(n − c, k) / C(n, k)

    Unbiased (2107.03374, equation 1), exact in integers. ValueError unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} right ones in {n} samples: needs 0 ≤ c ≤ n, 1 ≤ k ≤ n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
