"""From stored generations to outcomes: assemble programs, run them in the sandbox, judge the ends.

A function of records and problems that needs no model, so it can be repeated; for problems in the
form of HumanEval (2107.03374), of MBPP (2108.07732) and of MultiPL-E (2208.08227) in the ten
languages of `harness.languages`. Before the first program of a language canaries run: a good one
must pass and a bad, a looping, an early-leaving and a broken one must each fail in its own way,
else every outcome of the language is `infra`: a machine that cannot judge is not a model that
cannot code. The good one's time is the measure of the limits.

Outcomes: pass · wrong (an assertion failed) · exception (also memory, a crash, leaving before the
tests end) · compile (no program at all) · timeout · output_limit · infra (not judged: no score).
Python programs have the standard library alone, a fixed hash seed and a fixed seed of `random`. A
program that looks for the judge in its own process or files can deceive it; one that does not try
cannot.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from fusion.errors import RunError
from harness.languages import LANGUAGES, key, lay
from harness.sandbox import Limits, Outcome, Tier, choose, interpreter, run
from reports.records import PASS_METRICS

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
    tier: Tier | None = None,
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """The outcome of every generation of every record, in their order.

    records: `generation`, a list of completions, and `doc`, with prompt, test and entry_point, or
    tests as a list of statements, or prompt, tests and language. allow: the recipe's consent.
    workers: the machine's cores by default; changes no outcome but for programs at the edge of a
    limit, so timeouts are run once more, alone. tier: where, else as `sandbox.choose` finds it.
    limits: instead of each language's own. progress: called with the number of programs done.
    RunError without consent, if a record lacks a part, or if the tier asked for is not there.
    """
    if allow is not True:
        raise RunError(
            "generated code was not executed: that needs `evaluate.allow_code_execution: true` in "
            "the recipe"
        )
    _check(records)
    programs = [(g, record["doc"]) for record in records for g in record["generation"]]
    found = ["infra"] * len(programs)
    tier = tier or choose()
    bounds: dict[str, Limits] = {}
    for language in dict.fromkeys(language_of(document) for _, document in programs):
        if reason := unfit(language, tier):
            log.warning("no program in %s was judged: %s", title(language), reason)
        else:
            bounds[language] = limits or fitness(language, tier).limits
    waiting = {
        number: (*program, bounds[language_of(program[1])], tier)
        for number, program in enumerate(programs)
        if language_of(program[1]) in bounds
    }
    unjudged = len(programs) - len(waiting)
    if progress and unjudged:
        progress(unjudged)
    told = (lambda done: progress(unjudged + done)) if progress else None
    for number, outcome in _run(waiting, workers or os.cpu_count() or 1, told):
        found[number] = outcome
    each = iter(found)
    return [[next(each) for _ in record["generation"]] for record in records]


def toolchains(documents: Iterable[Mapping[str, Any]], tier: Tier) -> dict[str, str]:
    """The version of what judged the programs of these problems, by language; "" for none."""
    keys = sorted({language_of(document) for document in documents})
    return {key: fitness(key, tier).version for key in keys}


def language_of(document: Mapping[str, Any]) -> str:
    """The key of the language that a problem is written in; Python unless it says another."""
    return key(document.get("language", "py"))


def title(language: str) -> str:
    """The language's name for people."""
    return LANGUAGES[language].title if language in LANGUAGES else "Python"


def _check(records: Sequence[Mapping[str, Any]]) -> None:
    for number, record in enumerate(records):
        lacking = [name for name in ("generation", "doc") if name not in record]
        if not lacking:
            lacking = [f"doc.{name}" for name in _lacking(record["doc"])]
        if lacking:
            raise RunError(
                f"record {number} cannot be executed: it lacks {', '.join(lacking)}; needed are "
                "generation and doc with prompt, test and entry_point, or with tests as a list, or "
                "with prompt, tests and language"
            )
        try:
            language = language_of(record["doc"])
        except KeyError as error:
            known = ", ".join([*LANGUAGES, "py"])
            raise RunError(
                f"record {number} cannot be executed: language {error} is unknown; known: {known}"
            ) from None
        if language in LANGUAGES:
            lay(LANGUAGES[language], "", record["doc"]["tests"], "")


def _lacking(document: Mapping[str, Any]) -> list[str]:
    """Parts that a problem must have in its form and has not."""
    if isinstance(document.get("tests"), list):
        return []
    needed = ("prompt", "tests") if "tests" in document or "language" in document else _DOCUMENT
    return [name for name in needed if not isinstance(document.get(name), str)]


def _run(
    programs: Mapping[int, tuple[str, Mapping[str, Any], Limits, Tier]],
    workers: int,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[int, str]]:
    """The number and outcome of each program; those of timeouts a second time, from a run alone."""
    late = []
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = {pool.submit(judge, *programs[number]): number for number in programs}
        for done, future in enumerate(as_completed(waiting), start=1):
            yield waiting[future], future.result()
            late += [waiting[future]] if future.result() == "timeout" else []
            if progress:
                progress(done)
    finally:
        pool.shutdown(cancel_futures=True)
    for number in sorted(late):
        yield number, judge(*programs[number])


def judge(completion: str, document: Mapping[str, Any], limits: Limits, tier: Tier) -> str:
    """Run one completion against its problem's tests; one of OUTCOMES."""
    nonce = secrets.token_hex(16)
    language = language_of(document)
    if language in LANGUAGES:
        spoken = LANGUAGES[language]
        laid = lay(spoken, document["prompt"] + completion, document["tests"], nonce)
        command = ["/bin/sh", "judge.sh"]
        found = run(command, laid, limits, environment=spoken.environment, tier=tier)
        return verdict(found, nonce, spoken.wrong)
    program = assemble(completion, document)
    files: dict[str, str | bytes] = {"judge.py": JUDGE, "program.py": program, "nonce": nonce}
    command = [interpreter(tier), "-P", "-s", "-B", "judge.py"]
    found = run(command, files, limits, environment={"PYTHONHASHSEED": "0"}, tier=tier)
    return verdict(found, nonce)


def assemble(completion: str, document: Mapping[str, Any]) -> bytes:
    """The Python program of one completion, with the tests behind it.

    HumanEval's: prompt, completion, tests, the call of the tests. MBPP's: completion, what the
    tests set up, the tests; the prompt is text. MultiPL-E's: prompt, completion, tests.

    *Relative to* lm-eval's MBPP, which leaves out what the tests set up: task 367 needs it.
    """
    if isinstance(document.get("tests"), list):
        parts = [completion, document.get("setup") or "", *document["tests"]]
    elif "tests" in document:
        parts = [document["prompt"] + completion, document["tests"]]
    else:
        call = f"check({document['entry_point']})"
        parts = [document["prompt"] + completion, document["test"], call]
    return ("\n".join(parts) + "\n").encode(errors="replace")


def verdict(outcome: Outcome, nonce: str, wrong: str = "") -> str:
    """The word for how a program ended; to pass it must have printed the nonce last of all.

    wrong: what a failed assertion writes, where the exit status does not tell.

    Relative to the published harness: there a program that leaves early with status 0 passes.
    """
    if outcome.ending in ("timeout", "output_limit", "infra"):
        return outcome.ending
    exited = outcome.ending == "exit"
    if exited and outcome.code == 0 and outcome.stdout.endswith(f"\n{nonce}\n"):
        return "pass"
    if exited and outcome.code == COMPILE:
        return "compile"
    if wrong and re.search(wrong, f"{outcome.stdout}\n{outcome.stderr}", re.MULTILINE):
        return "wrong"
    if wrong or not exited:
        return "exception"
    return "wrong" if outcome.code == WRONG else "exception"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitness:
    """Whether this machine can judge programs in a language, and within which limits.

    reason: why not, else None. seconds: what the good canary took, building and all.
    """

    reason: str | None
    version: str = ""
    seconds: float = math.nan
    limits: Limits = Limits()


def unfit(language: str = "py", tier: Tier | None = None) -> str | None:
    """Why this machine cannot judge programs in a language, or None if all canaries end well."""
    return fitness(language, tier or choose()).reason


@cache
def fitness(language: str, tier: Tier) -> Fitness:
    """Run the canaries of a language in a tier, the good one first, and set limits by its time.

    Limits are the language's least ones, or ten times (wall) and five times (processor) the good
    canary's time where that is more.
    """
    try:
        version, reason = _toolchain(language, tier)
        if reason:
            return Fitness(reason=reason)
        return _canaries(language, version, tier)
    except (OSError, RunError) as error:
        return Fitness(reason=f"the sandbox cannot run a program: {error}")


def _toolchain(language: str, tier: Tier) -> tuple[str, str]:
    """The version of a language's compiler or interpreter, and why there is none."""
    if language not in LANGUAGES and tier.name != "container":
        return sys.version.split()[0], ""
    spoken = LANGUAGES.get(language)
    advice = f"Debian has it in {spoken.package if spoken else 'python3'}"
    for path in spoken.needs if spoken else ():
        if not _exists(path, tier):
            return "", f"no {path}; {advice}"
    command = spoken.version if spoken else (interpreter(tier), "--version")
    allowed, environment = (spoken.limits, spoken.environment) if spoken else (Limits(), None)
    found = run(command, {}, allowed, environment=environment, tier=tier)
    if found.ending != "exit" or found.code != 0:
        said = found.reason or found.stderr.strip()[-200:] or found.ending
        return "", f"no {command[0]} in the sandbox ({said}); {advice}"
    words = f"{found.stdout}\n{found.stderr}".strip().partition("\n")[0]
    number = re.search(r"\d+\.\d[\w.]*", words)
    return number[0] if number else words[:40], ""


def _exists(path: str, tier: Tier) -> bool:
    """Whether programs find a file; what they see of this machine's lies where it does here."""
    if tier.name != "container":
        return os.path.exists(path)
    return run(["test", "-e", path], {}, Limits(), tier=tier).code == 0


def _canaries(language: str, version: str, tier: Tier) -> Fitness:
    document, limits = dict(_DOCUMENT), Limits()
    canaries: tuple[tuple[str, str], ...] = CANARIES
    if language in LANGUAGES:
        prompt, tests = LANGUAGES[language].canary
        document = {"prompt": prompt, "tests": tests, "language": language}
        canaries, limits = LANGUAGES[language].bodies, LANGUAGES[language].limits
    seconds = math.nan
    for body, expected in canaries:
        allowed = limits
        if expected == "timeout":
            wall = 6.0 if language == "py" else seconds + 2.0  # it must have come to run by then
            allowed = replace(limits, cpu_seconds=1 if language == "py" else 60, wall_seconds=wall)
        began = time.monotonic()
        found = judge(body, document, allowed, tier)
        if found != expected:
            reason = f"the canary that must end as '{expected}' ended as '{found}':\n{body}"
            return Fitness(reason=reason, version=version)
        if math.isnan(seconds):
            seconds = time.monotonic() - began
            limits = replace(
                limits,
                wall_seconds=max(limits.wall_seconds, 10 * seconds),
                cpu_seconds=max(limits.cpu_seconds, math.ceil(5 * seconds)),
            )
    return Fitness(reason=None, version=version, seconds=seconds, limits=limits)


def summarise(outcomes: Sequence[str]) -> tuple[float, str, str | None]:
    """A problem's pass@1, one word for how its samples ended, and the count of each ending.

    Samples that were not judged do not count; without any judged one the score is NaN. The word is
    `infra` if any was not judged, else the commonest; counts are None for a single sample.
    """
    judged = [outcome for outcome in outcomes if outcome != "infra"]
    value = pass_at_k(len(judged), judged.count("pass"), 1) if judged else math.nan
    counts = {word: outcomes.count(word) for word in OUTCOMES if word in outcomes}
    word = (
        "infra"
        if len(judged) < len(outcomes) or not counts
        else max(counts, key=counts.__getitem__)
    )
    told = ", ".join(f"{word} {count}" for word, count in counts.items())
    return value, word, told if len(outcomes) > 1 else None


def passes(outcomes: Sequence[str]) -> dict[str, float]:
    """pass@k of a problem by metric, for k > 1 where that many of its samples were judged."""
    judged = [outcome for outcome in outcomes if outcome != "infra"]
    n, c = len(judged), judged.count("pass")
    wanted = {metric: int(metric.partition("@")[2]) for metric in PASS_METRICS}
    return {metric: pass_at_k(n, c, k) for metric, k in wanted.items() if k <= n}


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k samples drawn from n, of which c are right, hold a right one.

        pass@k = 1 − C(n − c, k) / C(n, k)

    Unbiased (2107.03374, equation 1), exact in integers. ValueError unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} right ones in {n} samples: needs 0 ≤ c ≤ n, 1 ≤ k ≤ n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
