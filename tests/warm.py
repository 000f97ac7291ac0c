"""Processes forked from one that has read the libraries: a start takes none of their seconds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# One line is a group: each of its processes runs a script with its own environment. Their numbers
# are told at once, and how they ended once all have.
_SERVER = """
import gc, importlib, json, os, signal, sys, traceback
told = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what modules print is no answer
for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()
signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the tests'
def run(job):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(job["environment"])
    sys.argv = job["argv"]
    code = 1
    try:
        exec(compile(job["script"], job["argv"][0], "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
for line in sys.stdin:
    children = []
    for job in json.loads(line):
        child = os.fork()
        if not child:
            run(job)
        children.append(child)
    print(*children, file=told, flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(*codes, file=told, flush=True)
"""


class Warm:
    """A server that has imported modules; `start` a group of processes, then `wait` for them."""

    def __init__(self, *modules: str) -> None:
        # What asks for GPUs must not begin to use them, which no fork of it could go on with.
        environment = {"PYTHONPATH": str(ROOT), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self.running: list[int] = []
        self.server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )

    def start(self, jobs: Sequence[dict[str, Any]]) -> list[int]:
        """Start a process for each job (see `job`); their numbers."""
        assert self.server.stdin
        if self.running:  # of a test that failed before it waited
            self._kill()
            self.wait()
        self.server.stdin.write(json.dumps(jobs) + "\n")
        self.server.stdin.flush()
        self.running = self._numbers()
        return self.running

    def wait(self) -> list[int]:
        """How those that were started last have ended: their exit codes, or −signal."""
        ended = self._numbers()
        self.running = []
        return ended

    def _numbers(self) -> list[int]:
        assert self.server.stdout
        line = self.server.stdout.readline()
        assert line, "the server has ended"
        return [int(word) for word in line.split()]

    def close(self) -> None:
        """End the server, and what it has running."""
        self._kill()
        self.server.communicate(timeout=60)

    def _kill(self) -> None:
        for number in self.running:
            with suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)


def job(
    script: str, said: Path, argv: Sequence[str] = (), out: Path | None = None, **environment: str
) -> dict[str, Any]:
    """A process of `Warm`: a script, what it finds as sys.argv, and the file of what it says.

    out: of what it prints; else in the same file.
    """
    return {
        "script": script,
        "argv": ["script.py", *argv],
        "out": str(out or said),
        "err": str(said),
        "environment": environment,
    }


def command(said: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """The job of a `kfuse` command; what it prints is not kept."""
    script = "from harness.cli import main; main()"
    return job(script, said, arguments, Path(os.devnull), **environment)


def ranks(script: str, said: Path, argv: Sequence[str], count: int, **environment: str) -> list:
    """Jobs of processes that train together, as torchrun would start them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    common |= {"LOCAL_WORLD_SIZE": str(count)} | environment
    return [
        job(script, said, argv, **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(count)
    ]
