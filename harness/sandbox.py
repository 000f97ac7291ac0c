"""Run a program that nobody has read: in a child process, in an empty folder, with hard limits.

Two tiers, recorded with every outcome. "namespace": own user, process, mount, network and IPC
namespaces, so no network and no sight of other processes; folders with personal content are covered
by empty ones and the rest of the file system is read-only. "process": limits only, where the system
allows no namespaces. In both: a fresh folder that is removed afterwards, no inherited environment,
standard input closed, limits on time, memory, processes, file size and output, and everything that
was started is killed at the end.

Not protected, in either tier: the kernel itself (no seccomp filter), reading of world-readable
files
that are not covered, and in the process tier also the network and other files of the same user.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_COVERED = ("/home", "/root", "/tmp", "/var/tmp", "/mnt", "/media", "/srv", "/run", "/dev/shm")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use. seconds: wall time; cpu_seconds; bytes; counts."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    processes: int = 32
    open_files: int = 64


@dataclass(frozen=True, slots=True)
class Result:
    """How a program ended. status: exited, timeout or output_limit; output: both streams."""

    status: str
    returncode: int
    output: str
    seconds: float
    tier: str


@cache
def tier() -> str:
    """The strongest tier that works here: namespace or process."""
    if not sys.platform.startswith("linux") or not shutil.which("unshare"):
        return "process"
    probe = [*_unshare(), sys.executable, "-c", "pass"]
    try:
        done = subprocess.run(probe, capture_output=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return "process"
    return "namespace" if done.returncode == 0 else "process"


def describe() -> str:
    """The tier in words, for `kfuse doctor`."""
    if tier() == "namespace":
        return "namespaces: no network, own processes, files read-only or covered"
    return "process limits only: generated code keeps the network and this user's files"


def _unshare() -> list[str]:
    flags = ["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount"]
    return ["unshare", *flags, "--mount-proc", "--net", "--ipc", "--uts", "--"]


def _inside(command: Sequence[str], folder: str) -> list[str]:
    """A shell line that closes the file system before it becomes the program."""
    python = {str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix)}
    keep = [p for p in python if p.startswith(_COVERED)]
    lines = ["set -e", "mkdir -p /proc/self/fd >/dev/null 2>&1 || true"]
    hold = f"{folder}/.hold"
    # What must stay visible under a covered folder is held aside and bound back.
    lines += [f"mkdir -p {hold}", f"mount -t tmpfs -o size=1m tmpfs {hold}"]
    for number, path in enumerate([*keep, folder + "/work"]):
        lines += [f"mkdir {hold}/{number}", f"mount --rbind {path} {hold}/{number}"]
    lines += [f"mkdir {hold}/root"]
    covered = [p for p in _COVERED if os.path.isdir(p)]
    lines += ["mount --make-rprivate / 2>/dev/null || true"]
    lines += [f"exec 3< {hold}"]
    for path in covered:
        lines.append(f"mount -t tmpfs -o size=1m tmpfs {path}")
    for number, path in enumerate([*keep, folder + "/work"]):
        lines += [f"mkdir -p {path}", f"mount --rbind /proc/self/fd/3/{number} {path}"]
    program = " ".join(_quote(part) for part in command)
    lines += ["exec 3<&-", "mount -o remount,bind,ro / 2>/dev/null || true"]
    lines += [f"cd {folder}/work", f"exec setpriv --no-new-privs {program}"]
    return ["sh", "-c", "\n".join(lines)]


def _quote(part: str) -> str:
    return "'" + part.replace("'", "'\\''") + "'"


def _limit(limits: Limits) -> None:
    cpu = int(limits.seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits.open_files, limits.open_files))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(command: Sequence[str], files: Mapping[str, str], limits: Limits) -> Result:
    """Run a command over some files in a folder of its own; never raises for what it does.

    files: name to content, written before. The folder is gone afterwards.
    """
    used = tier()
    folder = tempfile.mkdtemp(prefix="kfuse-")
    work = Path(folder, "work")
    work.mkdir()
    for name, content in files.items():
        (work / name).write_text(content)
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(work)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    full = [*_unshare(), *_inside(command, folder)] if used == "namespace" else list(command)
    started = time.monotonic()
    with Path(folder, "output").open("wb+") as output:
        process = subprocess.Popen(
            full,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=work,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: _limit(limits),
        )
        status = _watch(process, output, limits, started)
        _kill(process)
        output.seek(0)
        text = output.read(limits.output_bytes).decode(errors="replace")
    shutil.rmtree(folder, ignore_errors=True)
    return Result(status, process.returncode or 0, text, time.monotonic() - started, used)


def _watch(process: subprocess.Popen, output: object, limits: Limits, started: float) -> str:
    """Wait for the end, or for a limit that the system does not hold by itself."""
    import psutil

    pause = 0.002
    while process.poll() is None:
        if time.monotonic() - started > limits.seconds:
            return "timeout"
        if os.fstat(output.fileno()).st_size >= limits.output_bytes:  # type: ignore[attr-defined]
            return "output_limit"
        if pause > 0.02:
            try:
                if len(psutil.Process(process.pid).children(recursive=True)) > limits.processes:
                    return "processes"
            except psutil.Error:
                continue
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    full = os.fstat(output.fileno()).st_size >= limits.output_bytes  # type: ignore[attr-defined]
    return "output_limit" if full else "exited"


def _kill(process: subprocess.Popen) -> None:
    """End everything that was started: the session, and with it the process namespace."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        family = []
    for end in (lambda: os.killpg(process.pid, signal.SIGKILL), *(p.kill for p in family)):
        try:
            end()
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    process.wait()
