"""Hostile programs: nothing escapes, and the next program is unaffected."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusion.errors import RunError
from harness import execution, sandbox
from harness.execution import canaries, execute, judge, outcome, pass_at_k
from harness.sandbox import Limits, Result, run

PYTHON = str(Path(sys.executable).resolve())
QUICK = Limits(seconds=3)
needs_namespaces = pytest.mark.skipif(
    sandbox.tier() != "namespace", reason="this system allows no namespaces: not promised here"
)


def go(code: str, limits: Limits = QUICK) -> Result:
    return run([PYTHON, "-I", "-S", "main.py"], {"main.py": code}, limits)


@pytest.fixture(autouse=True)
def _the_next_program_is_unaffected() -> Iterator[None]:
    yield
    after = go("print(6 * 7)")
    assert (after.status, after.output) == ("exited", "42\n")


def test_a_program_sees_its_files_and_nothing_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do-not-show")
    result = go("import os\nprint(sorted(os.environ), os.listdir('.'))")
    assert "SECRET" not in result.output
    assert result.output.endswith("['main.py']\n")


@needs_namespaces
def test_no_network() -> None:
    result = go("import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)")
    assert "unreachable" in result.output or "refused" in result.output
    result = go("import socket\nprint(socket.if_nameindex())")
    assert "eth" not in result.output


@needs_namespaces
def test_no_writing_outside_and_no_reading_at_home(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("private")
    for code in (
        f"open({str(target)!r}, 'w')",
        f"print(open({str(target)!r}).read())",
        f"import os\nos.symlink({str(target)!r}, 'link')\nopen('link', 'a').write('x')",
        f"open({str(Path(__file__).parent / 'written')!r}, 'w')",
    ):
        assert "Error" in go(code).output, code
    assert target.read_text() == "private"
    home = go(f"import os\nprint(os.listdir({os.path.expanduser('~')!r}))").output
    assert ".bash" not in home


def test_time_is_limited_and_nothing_stays_alive() -> None:
    started = time.monotonic()
    assert go("while True: pass", Limits(seconds=0.5)).status == "timeout"
    assert time.monotonic() - started < 5
    mark = f"stay-{os.getpid()}-{time.time_ns()}"
    go(
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    sleep = 'import time; time.sleep(60)'\n"
        f"    os.execv(sys.executable, [sys.executable, '-c', sleep, {mark!r}])\n"
        "time.sleep(0.3)"
    )
    time.sleep(0.1)
    listed = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout
    if sandbox.tier() == "namespace":
        assert mark not in listed


def test_a_fork_bomb_ends() -> None:
    started = time.monotonic()
    result = go("import os\nwhile True:\n    os.fork()", Limits(seconds=2))
    assert result.status in ("processes", "timeout", "exited")
    assert time.monotonic() - started < 10


def test_output_and_memory_and_files_are_limited() -> None:
    flood = "import os\nwhile True:\n    os.write(1, b'x' * 65536)"
    result = go(flood, Limits(seconds=10, output_bytes=1 << 18))
    assert result.status == "output_limit"
    assert len(result.output) <= 1 << 18
    assert "MemoryError" in go("bytearray(50 * 10**9)").output
    assert go("open('big', 'wb').write(b'x' * (64 << 20))").returncode != 0


def test_killing_the_parent_kills_only_itself() -> None:
    result = go("import os\nos.kill(os.getppid(), 9)\nprint(1)")
    assert result.tier == sandbox.tier()


def test_canaries_are_right_here() -> None:
    assert canaries(QUICK) is None


DOCUMENT = {
    "prompt": "def double(x):\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("    return 2 * x", "pass"),
        ("    return x", "wrong"),
        ("    return y", "exception"),
        ("    return (", "compile"),
        ("    while True: pass", "timeout"),
        ("    import os; os._exit(0)", "exception"),
        ("    raise SystemExit(0)", "exception"),
        ("    import sys; sys.stdout.write('x' * (1 << 21)); return 4", "output_limit"),
    ],
)
def test_outcomes(completion: str, expected: str) -> None:
    assert judge(completion, DOCUMENT, Limits(seconds=2)) == expected


def test_a_printed_guess_does_not_pass() -> None:
    result = Result("exited", 0, "pass\nok\n", 0.1, "process")
    assert outcome(result, "nonce") == "exception"


def test_execution_keeps_order_and_asks_for_consent() -> None:
    records = [{"generation": [c], "doc": DOCUMENT} for c in ("    return x", "    return x + x")]
    assert execute(records, allow=True, limits=QUICK) == ["wrong", "pass"]
    with pytest.raises(RunError, match="allows"):
        execute(records, allow=False)


def test_a_machine_that_cannot_judge_says_infra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "canaries", lambda limits: "broken")
    assert execute([{"generation": [""], "doc": DOCUMENT}], allow=True) == ["infra"]


def test_pass_at_k() -> None:
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9)
    assert pass_at_k(4, 0, 2) == 0
    assert pass_at_k(3, 3, 1) == 1
    with pytest.raises(ValueError, match="needs"):
        pass_at_k(3, 4, 1)
