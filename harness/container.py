"""The sandbox's third tier: a fresh container for each program, of an image that the user names.

docker or podman shuts the program in: no network, nothing of this machine mounted, the image's
files read-only, one writable folder in memory, a user that owns nothing, no capabilities, limits of
memory and processes for all of it together, and the runtime's own filter of system calls. The
program's files go in through standard input. The image must have a POSIX sh, tar, sleep and what
the programs need (`python3`, `g++`, …); it is never pulled.

The first process of the container is a shell that unpacks, says so, starts the program and ends
when it ends or its time is over; with it everything ends, also when the harness is killed. What the
shell says is a secret word, as long as a program does not look for it; one that does can call its
own failure a timeout, and nothing more.
"""

from __future__ import annotations

import io
import os
import secrets
import selectors
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from fusion.errors import RunError
from harness.sandbox import Limits, Outcome, Tier

PROGRAMS = ("docker", "podman")
STARTING = 60.0  # seconds that a container may take to start and to go on a busy machine
WORK = "/tmp"
SHELLS = 3  # processes of the shell that starts the program

# $1: the secret word, $2: seconds, $3: KiB of address space or nothing; the rest is the program.
SHELL = """
word=$1 seconds=$2 space=$3; shift 3
umask 077
tar -xf - || exit 125
exec </dev/null
command -v "$1" >/dev/null || { echo "no $1 in the image" >&2; exit 127; }
trap 'echo "$word" >&2; exit 124' TERM
(trap - TERM; sleep "$seconds"; kill -TERM $$) >/dev/null 2>&1 &
echo "$word" >&2
if [ "$space" ]; then ulimit -v "$space"; fi
"$@" &
wait $!
"""


def find(image: str) -> Tier:
    """The tier that runs programs in this image. RunError if nothing here can, and why."""
    reasons = []
    for name in PROGRAMS:
        program = shutil.which(name)
        if program is None:
            reasons.append(f"no {name} on PATH")
            continue
        code, said = _ask(program, "image", "inspect", "--format", "{{.Id}}", image)
        if code:
            reasons.append(f"{name}: {said}")
            continue
        tier = Tier(name="container", program=program, image=image, image_id=said)
        found = run(["sh", "-c", "echo $((6 * 7))"], {}, Limits(), {}, tier)
        if (found.ending, found.stdout) == ("exit", "42\n"):
            return tier
        reasons.append(f"{name}: {found.reason or found.stderr.strip() or found.ending}")
    raise RunError(
        f"sandbox container:{image} was asked for and cannot run a program here: "
        f"{'; '.join(reasons)}. Make the image known to docker or podman (it is never pulled), or "
        "choose `namespace` or `process`"
    )


def _ask(program: str, *arguments: str) -> tuple[int, str]:
    """Exit status of a command of the runtime, and the last line that it said."""
    try:
        found = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=STARTING
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    lines = (found.stderr if found.returncode else found.stdout).strip().splitlines()
    return found.returncode, lines[-1] if lines else ""


def command_line(
    command: Sequence[str],
    limits: Limits,
    environment: Mapping[str, str],
    tier: Tier,
    name: str,
    word: str,
) -> list[str]:
    """How the runtime is called; options that docker and podman understand alike."""
    uid = 20_000 + secrets.randbelow(40_000)  # in what a rootless runtime has, and nobody's
    processes = limits.processes + SHELLS
    space = str(limits.memory_bytes >> 10) if limits.limit_address_space else ""
    bounds = {
        "cpu": f"{limits.cpu_seconds}:{limits.cpu_seconds + 1}",
        "fsize": f"{limits.file_bytes}:{limits.file_bytes}",
        "nofile": f"{limits.open_files}:{limits.open_files}",
        "nproc": f"{processes}:{processes}",
        "core": "0:0",
    }
    inside = {"LANG": "C.UTF-8", "HOME": WORK, "TMPDIR": WORK, **environment}
    podman = os.path.basename(tier.program) == "podman"
    own = ["--read-only-tmpfs=false"] if podman else []
    writable = f"{WORK}:rw,exec,nosuid,nodev,size={limits.disk_bytes},mode=1777"
    writable += ",notmpcopyup" if podman else ""
    return [
        tier.program,
        *("run", "--rm", "--interactive", "--name", name, "--pull", "never", *own),
        *("--network", "none", "--read-only", "--ipc", "private", "--log-driver", "none"),
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--user", f"{uid}:{uid}", "--pids-limit", str(processes)),
        *("--memory", str(limits.memory_bytes), "--memory-swap", str(limits.memory_bytes)),
        *("--tmpfs", writable, "--workdir", WORK, "--shm-size", "64k", "--stop-timeout", "0"),
        *(part for key, bound in bounds.items() for part in ("--ulimit", f"{key}={bound}")),
        *(part for key, value in inside.items() for part in ("--env", f"{key}={value}")),
        *("--entrypoint", "sh", tier.image, "-c", SHELL, "kfuse"),
        *(word, str(limits.wall_seconds), space),
        *command,
    ]


def run(
    command: Sequence[str],
    files: Mapping[str, str | bytes],
    limits: Limits,
    environment: Mapping[str, str],
    tier: Tier,
) -> Outcome:
    """Run a command in a fresh container that holds `files`; as `sandbox.run`, which calls this.

    cpu_seconds is 0, and seconds leave out what the container took to start.
    """
    name, word = f"kfuse-{secrets.token_hex(8)}", secrets.token_hex(16)
    line = command_line(command, limits, environment, tier, name, word)
    streams = _Streams(word.encode() + b"\n")
    # A folder of its own: podman's monitor leaves a file where it was started.
    with (
        tempfile.TemporaryDirectory(prefix="kfuse-sandbox-") as folder,
        tempfile.TemporaryFile(dir=folder) as archive,
    ):
        _pack(files, archive)
        try:
            process = subprocess.Popen(
                line,
                stdin=archive,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            return streams.outcome(125, limits, tier, f"cannot start {tier.program}: {error}")
        try:
            stopped = streams.watch(process, limits)
        finally:
            if process.poll() is None:
                process.kill()
                _ask(tier.program, "rm", "--force", name)
            code = process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
    return streams.outcome(code, limits, tier, stopped)


def _pack(files: Mapping[str, str | bytes], out: IO[bytes]) -> None:
    """Write the files as a tar archive that a process can read from its start."""
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o600
            archive.addfile(entry, io.BytesIO(data))
    out.seek(0)


class _Streams:
    """What came out of a container, and when its program began and ended."""

    def __init__(self, word: bytes) -> None:
        self.word = word
        self.stdout, self.stderr = bytearray(), bytearray()
        self.began: float | None = None
        self.ended = 0.0

    def watch(self, process: subprocess.Popen[bytes], limits: Limits) -> str:
        """Read until both streams are closed; why the harness stopped before that, or ""."""
        assert process.stdout is not None
        assert process.stderr is not None
        backstop = time.monotonic() + limits.wall_seconds + STARTING
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout.fileno(), selectors.EVENT_READ, self.stdout)
            selector.register(process.stderr.fileno(), selectors.EVENT_READ, self.stderr)
            while selector.get_map():
                for key, _ in selector.select(max(0.0, backstop - time.monotonic())):
                    data = os.read(key.fd, 1 << 16)
                    key.data.extend(data)
                    if not data:
                        selector.unregister(key.fd)
                    self.ended = time.monotonic()
                if self.began is None and self.word in self.stderr:
                    self.began = self.ended
                    backstop = self.began + limits.wall_seconds + STARTING / 10
                if len(self.stdout) + len(self.stderr) > limits.output_bytes + len(self.word):
                    return "output_limit"
                if time.monotonic() >= backstop:
                    return "timeout"
        with suppress(subprocess.TimeoutExpired):
            process.wait(STARTING)
        return ""

    def outcome(self, code: int, limits: Limits, tier: Tier, stopped: str) -> Outcome:
        """How the program ended, from the container's exit status and the shell's word."""
        said, found, written = bytes(self.stderr).partition(self.word)
        seconds = self.ended - self.began if self.began else 0.0
        late = written.endswith(self.word) and code == 124
        ending, status, reason = "exit", code, ""
        if not found:
            lines = said.decode(errors="replace").strip().splitlines()
            ending, status, reason = "infra", -1, stopped or (lines[-1] if lines else "no word")
        elif stopped == "output_limit":
            ending, status, reason = stopped, -1, f"more than {limits.output_bytes} bytes"
        elif stopped or late:
            ending, status, reason = "timeout", -1, f"{limits.wall_seconds} s of wall time"
            written = written.removesuffix(self.word)
        elif code == 128 + 24 or (code == 128 + 9 and seconds > limits.cpu_seconds):
            ending, status, reason = "timeout", -1, f"{limits.cpu_seconds} s of processor time"
        elif code > 128:
            ending, status = "signal", code - 128
            reason = "killed, as when memory runs out" if status == 9 else ""
        bound = limits.output_bytes
        return Outcome(
            ending=ending,  # type: ignore[arg-type]
            code=status,
            stdout=bytes(self.stdout[:bound]).decode(errors="replace"),
            stderr=(written if found else said)[:bound].decode(errors="replace"),
            seconds=seconds,
            cpu_seconds=0.0,
            tier=tier.name,
            reason=reason,
        )
