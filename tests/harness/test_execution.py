"""Outcomes of completions: each in its own word, in order, repeatable, and none by accident."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import RunError
from harness import execution
from harness.execution import (
    CANARIES,
    OUTCOMES,
    execute,
    fitness,
    pass_at_k,
    passes,
    unfit,
    verdict,
)
from harness.sandbox import Limits, Outcome, Tier

QUICK = Limits(wall_seconds=3.0, cpu_seconds=1, output_bytes=1 << 16)
DOUBLE = {
    "prompt": "import math\ndef double(x):\n    '''Twice x.'''\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n",
    "entry_point": "double",
}


def record(*completions: str) -> dict[str, Any]:
    return {"task": "t", "doc_id": 0, "generation": list(completions), "doc": DOUBLE}


def outcomes(*completions: str, **options: Any) -> list[str]:
    options = {"allow": True, "limits": QUICK} | options
    found = execute([record(completion) for completion in completions], **options)
    return [outcome for (outcome,) in found]


EXPECTED = {
    "    return 2 * x\n": "pass",
    "    return x\n": "wrong",
    "    return y\n": "exception",
    "    return (\n": "compile",
    "    return '\0'\n": "compile",
    "  return 2 * x\n": "compile",
    "    while True: pass\n": "timeout",
    "    print('x' * 70_000)\n    return 2 * x\n": "output_limit",
    "    return bytearray(50 << 30)\n": "exception",
    "    return double(x)\n": "exception",
    "    import os; os.abort()\n": "exception",
    # Leaving early with status 0 does not pass, wherever it happens.
    "    import os; os._exit(0)\n": "exception",
    "    raise SystemExit(0)\n": "exception",
    "    return 2 * x\nimport sys\nsys.exit(0)\n": "exception",
    "    print('all tests passed')\n    import os; os._exit(0)\n": "exception",
    # What a program does to its own streams or leaves running decides nothing.
    "    print('no newline', end='')\n    return 2 * x\n": "pass",
    "    import sys; sys.stdout = None\n    return 2 * x\n": "pass",
    "    import sys; sys.stdout.close()\n    return 2 * x\n": "pass",
    "    import threading, time\n    threading.Thread(target=time.sleep, args=(60,)).start()\n"
    "    return 2 * x\n": "pass",
    # As in the published harness, a main block does not run.
    "    return 2 * x\nif __name__ == '__main__':\n    raise ValueError\n": "pass",
    "    import numpy\n    return 2 * x\n": "exception",
}


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return dict(zip(EXPECTED, outcomes(*EXPECTED, workers=4), strict=True))


@pytest.mark.parametrize("completion", EXPECTED)
def test_each_end_has_its_word(found: dict[str, str], completion: str) -> None:
    assert found[completion] == EXPECTED[completion]
    assert found[completion] in OUTCOMES


def test_the_order_is_the_records_and_workers_change_nothing() -> None:
    slow = "    import time; time.sleep(0.2)\n    return 2 * x\n"
    bodies = (slow, "    return x\n", "    return (\n")
    expected = ["pass", "wrong", "compile"]
    assert outcomes(*bodies, workers=1) == outcomes(*bodies, workers=4) == expected


def test_hash_order_and_chance_are_fixed() -> None:
    ask = "import random; random.seed(0); print((hash('kfuse'), random.random()))"
    environment = {"PYTHONHASHSEED": "0"}
    expected = subprocess.check_output([sys.executable, "-c", ask], env=environment, text=True)
    body = "    import random\n    drawn = (hash('kfuse'), random.random())\n"
    body += f"    assert x == 0 or drawn == {expected.strip()}\n    return 2 * x\n"
    assert outcomes(body) == ["pass"]


def test_samples_are_judged_one_by_one_and_progress_is_told() -> None:
    told: list[int] = []
    records = [
        record("    return x\n", "    return x + x\n"),
        record(),
        record("    return 4 * x / 2\n"),
    ]
    found = execute(records, allow=True, limits=QUICK, progress=told.append)
    assert found == [["wrong", "pass"], [], ["pass"]]
    assert told == [1, 2, 3]
    assert execute([], allow=True) == []


def test_progress_ends_full_though_a_language_cannot_be_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[int] = []
    monkeypatch.setattr(execution, "unfit", lambda language, _: language == "rb" and "no ruby")
    ruby = {"prompt": "", "tests": "", "language": "rb"}
    records = [{"generation": ["x"] * 2, "doc": ruby}, record("    return 2 * x\n")]
    assert execute(records, allow=True, progress=told.append) == [["infra"] * 2, ["pass"]]
    assert told == [2, 3]


@pytest.mark.parametrize("allow", [False, None, 1, "yes"])
def test_nothing_runs_without_consent(allow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "run", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(RunError, match="allow_code_execution: true"):
        execute([record("    return x\n")], allow=allow)


def test_a_record_that_lacks_a_part_is_named() -> None:
    broken = {"generation": ["x"], "doc": {"prompt": "", "test": ""}}
    with pytest.raises(RunError, match=r"record 1 .* doc\.entry_point"):
        execute([record("    return x\n"), broken], allow=True)


def test_a_timeout_is_tried_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def judged(completion: str, document: object, limits: Limits, tier: Tier) -> str:
        asked.append((completion, time.monotonic()))
        again = [c for c, _ in asked].count(completion) > 1
        time.sleep(0.05)
        return {"never": "timeout", "busy": "pass" if again else "timeout"}.get(completion, "wrong")

    monkeypatch.setattr(execution, "judge", judged)
    monkeypatch.setattr(execution, "unfit", lambda *_: None)
    assert outcomes("never", "bad", "busy", workers=3) == ["timeout", "wrong", "pass"]
    assert [completion for completion, _ in asked][3:] == ["never", "busy"]
    assert asked[4][1] - asked[3][1] >= 0.05


def test_this_machine_is_fit() -> None:
    assert unfit() is None


@pytest.mark.parametrize("broken", range(len(CANARIES)))
def test_one_wrong_canary_makes_everything_infra(
    broken: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [expected for _, expected in CANARIES]
    answers[broken] = "wrong" if answers[broken] == "pass" else "pass"
    replies = iter(answers)
    monkeypatch.setattr(execution, "judge", lambda *_: next(replies))
    fitness.cache_clear()
    try:
        assert outcomes("    return x\n", "    return 2 * x\n") == ["infra", "infra"]
    finally:
        fitness.cache_clear()
    assert "canary" in caplog.text


def test_a_broken_sandbox_is_infra_and_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "interpreter", lambda *_: "/no/such/python")
    fitness.cache_clear()
    try:
        assert outcomes("    return 2 * x\n") == ["infra"]
        assert "'infra'" in (unfit() or "")
    finally:
        fitness.cache_clear()


@pytest.mark.parametrize(
    ("ending", "code", "stdout", "expected"),
    [
        ("exit", 0, "text\nNONCE\n", "pass"),
        ("exit", 0, "text\nNONCE\nmore\n", "exception"),
        ("exit", 0, "textNONCE\n", "exception"),
        ("exit", 0, "", "exception"),
        ("exit", 1, "\nNONCE\n", "exception"),
        ("signal", 0, "\nNONCE\n", "exception"),
        ("memory", -1, "\nNONCE\n", "exception"),
        ("timeout", -1, "\nNONCE\n", "timeout"),
        ("output_limit", -1, "\nNONCE\n", "output_limit"),
        ("infra", -1, "\nNONCE\n", "infra"),
    ],
)
def test_only_status_zero_and_the_nonce_last_pass(
    ending: Any, code: int, stdout: str, expected: str
) -> None:
    outcome = Outcome(
        ending=ending, code=code, stdout=stdout, stderr="", seconds=0.1, cpu_seconds=0.1,
        tier="process", reason="",
    )  # fmt: skip
    assert verdict(outcome, "NONCE") == expected


def test_every_published_solution_of_some_problems_passes() -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "humaneval"
    files = sorted(folder.glob("*.jsonl*"))
    if not files:
        pytest.skip("no copy of HumanEval beside the repository")
    packed = files[0].read_bytes()
    text = gzip.decompress(packed) if files[0].suffix == ".gz" else packed
    documents = [json.loads(line) for line in text.splitlines()][::33]
    solved = [{"generation": [d["canonical_solution"]], "doc": d} for d in documents]
    empty = [{"generation": ["    pass\n"], "doc": d} for d in documents]
    found = [outcome for (outcome,) in execute([*solved, *empty], allow=True)]
    assert found[: len(solved)] == ["pass"] * len(solved)
    assert "pass" not in found[len(solved) :]


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(n: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_refuses_what_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs"):
        pass_at_k(n, c, k)


def test_pass_at_ten_needs_ten_samples_that_were_judged() -> None:
    outcomes = ["pass", *["wrong"] * 11, "infra"]
    assert passes(outcomes) == {
        "pass@10": pytest.approx(1 - 11 * 1 / 66)
    }  # 1 − C(11, 10) / C(12, 10)
    assert passes([*["wrong"] * 9, "infra"]) == {}
    assert passes(["pass"] * 100) == {"pass@10": 1.0, "pass@100": 1.0}
