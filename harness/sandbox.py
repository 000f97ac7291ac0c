"""Run a program that nobody has read: in a child process, in an empty folder, with hard limits.

Three tiers, recorded with every outcome. Unless the recipe or KFUSE_SANDBOX names one, the
strongest that needs no image is found once, by trying. "container:IMAGE": see `harness.container`.
"namespace" (Linux 5.12 or newer): own user, process, mount, network and IPC namespaces. No
network, no sight of other processes, a root that holds a read-only toolchain and one small
writable folder in memory, a user that owns nothing, no capabilities, nothing left alive at the
end. "process": only what an ordinary process can give up. In all: a fresh folder that is gone
afterwards, no inherited environment, standard input closed, limits on wall and processor time,
memory, processes, files and output.

Not protected, and as important. In any tier: the kernel itself, as no system call is filtered (a
container's runtime filters some); side channels; what is readable in the toolchain's folders (/usr
and the interpreter's, or the image's). Outside containers, the memory
of several processes together is sampled, so a short peak can exceed the limit. In the process tier
also: the network; whatever this user may read or write, which includes this program's environment
in /proc and, for root, the machine; this program's life; the disk, but for the size of one file; a
fork bomb of root; and a process that first kills its watcher and then leaves its session lives on.
"""

from __future__ import annotations

import glob
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from fusion.errors import RunError

Ending = Literal["exit", "signal", "timeout", "memory", "output_limit", "infra"]

WANTED = r"(namespace|process|container:\S+)?"  # what `choose` understands
ENCLOSURE = Path(__file__).with_name("enclosure.py")
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
GRACE = 5.0  # seconds that building and leaving the enclosure may take on a busy machine
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/nix/store")
SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/R", "/etc/java-*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a program may use; what is beyond ends it, or fails in it."""

    wall_seconds: float = 12.0
    cpu_seconds: int = 5  # of one process; whole seconds, as the kernel counts
    memory_bytes: int = 2 << 30  # address space of a process; in namespaces, resident memory of all
    limit_address_space: bool = (
        True  # False for JVM, Node and Go, which reserve far more than they use
    )
    processes: int = 32  # with threads
    file_bytes: int = 16 << 20  # one file
    disk_bytes: int = 64 << 20  # all files; namespace tier only
    open_files: int = 256
    output_bytes: int = 1 << 20  # both streams together


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """How programs are shut in on this machine, and why not better."""

    name: Literal["container", "namespace", "process"]
    drop: bool = False  # process tier: run by root, become a user that owns nothing
    reason: str = ""
    program: str = ""  # container tier: docker or podman
    image: str = ""
    image_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a program ended.

    code: exit status for "exit", signal number for "signal", else -1. The streams are cut at the
    output limit. seconds are of wall time; cpu_seconds is 0 where the program had to be killed.
    """

    ending: Ending
    code: int
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    tier: str
    reason: str


def run(
    command: Sequence[str],
    files: Mapping[str, str | bytes],
    limits: Limits,
    *,
    environment: Mapping[str, str] | None = None,
    tier: Tier | None = None,
) -> Outcome:
    """Run a command in a folder that holds `files` and nothing else; never raises for what it does.

    files: relative names with content, folders are made. environment: beyond PATH, LANG and HOME.
    tier: as `choose` finds it, unless given. ValueError if a file's name leads out of the folder.
    """
    tier = tier or choose()
    _inside(files)
    if tier.name == "container":
        from harness.container import run as run_in_container

        return run_in_container(command, files, limits, environment or {}, tier)
    capture = _Capture()
    with _folder(files) as folder:
        read, report = os.pipe()
        job = _job(command, files, limits, environment or {}, tier, folder, report)
        try:
            process = subprocess.Popen(
                [interpreter(), "-I", "-S", str(ENCLOSURE), json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={},
                start_new_session=True,
                pass_fds=(report,),
            )
        except OSError as error:
            os.close(read)
            return capture.outcome(tier, limits, f"cannot start: {error}")
        finally:
            os.close(report)
        with os.fdopen(read, "rb", buffering=0) as reports:
            try:
                capture.watch(process, reports.fileno(), limits)
            finally:
                _end(process, reports.fileno(), capture)
    return capture.outcome(tier, limits)


def interpreter(tier: Tier | None = None) -> str:
    """The Python that runs this, without its virtual environment; in a container, the image's."""
    if tier and tier.name == "container":
        return "python3"
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def choose(wanted: str | None = None) -> Tier:
    """The tier that a recipe's `evaluate.sandbox` or else KFUSE_SANDBOX names, else the strongest.

    RunError for an unknown name, and for a tier that cannot run a program here: no other is taken
    in its place.
    """
    wanted = wanted or os.environ.get("KFUSE_SANDBOX") or ""
    if not re.fullmatch(WANTED, wanted):
        raise RunError(
            f"KFUSE_SANDBOX={wanted}: unknown; known: namespace, process, container:IMAGE"
        )
    return _found(wanted) if wanted else strongest()


@lru_cache
def _found(wanted: str) -> Tier:
    name, _, image = wanted.partition(":")
    if image:
        from harness.container import find

        return find(image)
    return _first([option for option in _options() if option.name == name], name)


@lru_cache(maxsize=1)
def strongest() -> Tier:
    """The strongest tier that works here, tried in order. RunError if not even a process runs."""
    return _first(_options(), "any tier")


def _options() -> list[Tier]:
    """The tiers that need no image, the strongest first."""
    options = [Tier(name="namespace")] if sys.platform == "linux" else []
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    return [*options, *([Tier(name="process", drop=True)] if as_root else []), Tier(name="process")]


def _first(options: Sequence[Tier], what: str) -> Tier:
    """The first of these tiers in which a program runs."""
    reasons = [] if sys.platform == "linux" else [f"{sys.platform} has no namespaces"]
    for option in options:
        found = run([interpreter(), "-I", "-S", "-c", "print(6 * 7)"], {}, Limits(), tier=option)
        if found.ending == "exit" and found.stdout == "42\n":
            return Tier(name=option.name, drop=option.drop, reason="; ".join(reasons))
        reasons.append(found.reason or found.stderr.strip() or found.ending)
    raise RunError(f"no program can be run in the sandbox here ({what}): {'; '.join(reasons)}")


def describe(tier: Tier | None = None) -> str:
    """The tier of this machine in a line, for `kfuse doctor`."""
    tier = tier or choose()
    if tier.name == "container":
        return f"container of {tier.image} by {tier.program}: no network, own files, no privileges"
    if tier.name == "namespace":
        return "namespaces: no network, own processes, own files; the kernel is shared"
    kept = "this machine's readable files" if tier.drop else "all files of this user"
    if os.geteuid() == 0 and not tier.drop:
        kept += ", who is root: do not run code that you would not run yourself"
    return (
        f"process limits only: programs keep the network and {kept} ({tier.reason or 'asked for'})"
    )


def _inside(files: Mapping[str, str | bytes]) -> None:
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"'{name}' is no name of a file inside the program's folder")


@contextmanager
def _folder(files: Mapping[str, str | bytes]) -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="kfuse-sandbox-")
    try:
        for name, content in files.items():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.encode() if isinstance(content, str) else content)
        yield folder
    finally:
        _remove(folder)


def _remove(folder: str) -> None:
    """Remove a folder whose permissions the program may have taken away; no link is followed."""
    folders = [folder]
    for place in folders:
        with suppress(OSError):
            os.chmod(place, 0o700)
            folders += [e.path for e in os.scandir(place) if e.is_dir(follow_symlinks=False)]
    with suppress(RecursionError):  # a hostile depth is litter, not an error of the measurement
        shutil.rmtree(folder, ignore_errors=True)


def _job(
    command: Sequence[str],
    files: Mapping[str, str | bytes],
    limits: Limits,
    environment: Mapping[str, str],
    tier: Tier,
    folder: str,
    report: int,
) -> dict[str, Any]:
    """What `enclosure.py` is told."""
    namespaces = tier.name == "namespace"
    home = "/tmp" if namespaces else folder
    allowed = limits.processes
    if not namespaces and not tier.drop:
        allowed += _threads()  # the system counts all of this user's
    return {
        "command": list(command),
        "environment": {**ENVIRONMENT, "HOME": home, "TMPDIR": home, **environment},
        "files": list(files),
        "folder": folder,
        "report": report,
        "namespaces": namespaces,
        "drop": tier.drop,
        "visible": _visible(),
        **asdict(limits),
        "processes": allowed,
        "memory_bytes_watched": limits.memory_bytes if namespaces else None,
    }


def _visible() -> list[str]:
    """What a program sees of this machine's files: the system's programs and this interpreter."""
    prefix = os.path.realpath(sys.base_prefix)
    own = [interpreter(), *(f"{prefix}/{part}" for part in ("lib", "lib64"))]
    covered = tuple(f"{path}/" for path in SYSTEM)
    settings = [path for pattern in SETTINGS for path in glob.glob(pattern)]
    return [*SYSTEM, *settings, *(path for path in own if not path.startswith(covered))]


def _threads() -> int:
    """Threads of this user on this machine, 0 where the system does not list them."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.stat().st_uid == os.getuid():
                total += len(os.listdir(entry / "task"))
        except OSError:
            continue
    return total


class _Capture:
    """What came out of a program so far, and how it ended."""

    def __init__(self) -> None:
        self.streams: dict[str, bytearray] = {
            name: bytearray() for name in ("stdout", "stderr", "report")
        }
        self.stopped: tuple[Ending, str] | None = None

    def watch(self, process: subprocess.Popen[bytes], report: int, limits: Limits) -> None:
        """Read until all is closed, a limit is reached, or the enclosure is gone."""
        assert process.stdout is not None
        assert process.stderr is not None
        backstop = time.monotonic() + limits.wall_seconds + GRACE
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout.fileno(), selectors.EVENT_READ, "stdout")
            selector.register(process.stderr.fileno(), selectors.EVENT_READ, "stderr")
            selector.register(report, selectors.EVENT_READ, "report")
            while selector.get_map():
                ready = selector.select(max(0.0, backstop - time.monotonic()))
                if not ready:
                    return
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    self.streams[key.data] += data
                    if not data:
                        selector.unregister(key.fd)
                        if key.data == "report":  # what still holds a stream has escaped
                            backstop = min(backstop, time.monotonic() + 0.5)
                written = len(self.streams["stdout"]) + len(self.streams["stderr"])
                if written > limits.output_bytes:
                    self.stopped = ("output_limit", f"more than {limits.output_bytes} bytes")
                    return

    def reports(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.streams["report"].splitlines() if line]

    def outcome(self, tier: Tier, limits: Limits, failure: str = "") -> Outcome:
        """The first ending that was reported, unless the harness stopped the program itself."""
        reports = self.reports()
        facts: dict[str, Any] = {"ending": "infra", "reason": failure or "no end was reported"}
        if any("started" in found for found in reports):  # or it could choose not to be counted
            facts = {"ending": "signal", "code": 9, "reason": "it killed its watcher"}
        facts = next((found for found in reports if "ending" in found), facts)
        ending, reason = self.stopped or (facts["ending"], facts.get("reason", ""))
        cpu = facts.get("cpu_seconds", 0.0)
        exhausted = facts.get("code") == signal.SIGXCPU or cpu >= limits.cpu_seconds
        if ending == "signal" and exhausted:
            ending, reason = "timeout", f"{limits.cpu_seconds} s of processor time"
        text = {
            name: bytes(data[: limits.output_bytes]).decode(errors="replace")
            for name, data in self.streams.items()
        }
        return Outcome(
            ending=ending,
            code=facts.get("code", -1) if ending in ("exit", "signal") else -1,
            stdout=text["stdout"],
            stderr=text["stderr"],
            seconds=facts.get("seconds", 0.0),
            cpu_seconds=cpu,
            tier=tier.name,
            reason=reason,
        )


def _end(process: subprocess.Popen[bytes], report: int, capture: _Capture) -> None:
    """Let the enclosure end what it holds; by force if it does not, and never leave it behind.

    It is not reaped before the end, so that its number cannot belong to another process meanwhile.
    """
    os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    with selectors.DefaultSelector() as selector:
        selector.register(report, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            data = os.read(report, 1 << 16)
            if not data:
                break
            capture.streams["report"] += data
    leaders = [process.pid]
    if not any("ending" in found for found in capture.reports()):
        leaders += [found["started"] for found in capture.reports() if "started" in found]
    for leader in leaders:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
