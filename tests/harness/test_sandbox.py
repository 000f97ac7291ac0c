"""Hostile programs, in every tier that this machine has: what is promised holds, and the next
program is unaffected."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import sandbox
from harness.sandbox import Limits, Outcome, Tier, describe, interpreter, run, strongest

ROOT = Path(__file__).resolve().parents[2]
QUICK = Limits(wall_seconds=4.0, cpu_seconds=2)
PROCESS = Tier(name="process")
AS_ROOT = os.geteuid() == 0


@pytest.fixture(params=["namespace", "process"])
def tier(request: pytest.FixtureRequest) -> Iterator[Tier]:
    """Each tier in turn; after the attack an honest program must still run in it."""
    chosen = strongest() if request.param == "namespace" else PROCESS
    if chosen.name != request.param:
        pytest.skip(f"no namespaces here: {chosen.reason}")
    yield chosen
    after = go("print(6 * 7)", chosen)
    assert (after.ending, after.stdout) == ("exit", "42\n"), after


@pytest.fixture
def namespace() -> Tier:
    if strongest().name != "namespace":
        pytest.skip(f"promised in namespaces only, which are not here: {strongest().reason}")
    return strongest()


def go(code: str, tier: Tier, limits: Limits = QUICK, *arguments: str) -> Outcome:
    command = [interpreter(), "-I", "-S", "main.py", *arguments]
    return run(command, {"main.py": code}, limits, tier=tier)


def alive(mark: str) -> bool:
    """Whether any process on this machine has the mark in its command line."""
    time.sleep(0.05)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                return True
        except OSError:
            continue
    return False


def test_what_a_program_gets_and_gives(tier: Tier) -> None:
    code = (
        "import os, sys\n"
        "print(sorted(os.listdir('.')), open('data/a.bin', 'rb').read(), sys.stdin.read())\n"
        "print(os.getcwd() == os.environ['HOME'])\n"
        "print('oops', file=sys.stderr)\n"
        "sys.exit(7)\n"
    )
    files = {"main.py": code, "data/a.bin": b"\x00\xff"}
    found = run([interpreter(), "-I", "-S", "main.py"], files, QUICK, tier=tier)
    assert (found.ending, found.code, found.stderr) == ("exit", 7, "oops\n")
    assert found.stdout == "['data', 'main.py'] b'\\x00\\xff' \nTrue\n"
    assert found.tier == tier.name
    assert 0 < found.cpu_seconds <= 2
    assert 0 < found.seconds <= 4


@pytest.mark.parametrize("name", ["../a", "/a", "b/../../a", ""])
def test_a_file_name_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="inside the program's folder"):
        run(["true"], {name: ""}, QUICK)


def test_a_program_that_cannot_start_is_infra(tier: Tier) -> None:
    found = run(["no-such-program"], {}, QUICK, tier=tier)
    assert found.ending == "infra"
    assert "no-such-program" in found.reason


def test_the_folder_is_gone_and_links_out_of_it_are_not_followed(
    tier: Tier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (outside / "kept").write_text("kept")
    code = (
        "import os\n"
        f"os.symlink({str(outside)!r}, 'link')\n"
        "os.makedirs('locked/inner')\nopen('locked/inner/file', 'w').close()\n"
        f"os.symlink({str(outside)!r}, 'locked/link')\n"
        "os.chmod('locked', 0)\nos.chmod('.', 0)\n"
    )
    assert go(code, tier).ending == "exit"
    assert os.listdir(tmp_path) == ["outside"]
    assert (outside / "kept").read_text() == "kept"
    assert outside.stat().st_mode & 0o777 == 0o755


def test_the_environment_is_not_inherited(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do-not-show")
    code = "import os\nprint(sorted(k for k in os.environ if k != 'LC_CTYPE'))"
    assert go(code, tier).stdout == "['HOME', 'LANG', 'PATH', 'TMPDIR']\n"


def test_the_watcher_has_no_environment_to_read() -> None:
    code = (
        "import os\n"
        "try: print(repr(open(f'/proc/{os.getppid()}/environ').read()))\n"
        "except PermissionError: print('not allowed')\n"
    )
    assert go(code, PROCESS).stdout in ("''\n", "not allowed\n")


def test_nothing_of_the_environment_is_left_in_proc(
    namespace: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import glob\n"
        "for path in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try: print(open(path).read())\n"
        "    except OSError: pass\n"
        "print(sorted(int(p[6:]) for p in glob.glob('/proc/[0-9]*')))\n"
    )
    monkeypatch.setenv("SECRET_TOKEN", "do-not-show")
    found = go(code, namespace).stdout
    assert "do-not-show" not in found
    assert found.endswith("[1, 2]\n")


def test_no_network(namespace: Tier) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)\n"
        control = go(code, PROCESS)
        assert (control.ending, control.code) == ("exit", 0), "the attack itself must work"
        assert "OSError" in go(code, namespace).stderr
    listed = go("import socket\nprint([n for _, n in socket.if_nameindex()])", namespace)
    assert "eth" not in listed.stdout
    assert "lo" in listed.stdout


def test_no_socket_of_this_machine_can_be_reached(namespace: Tier) -> None:
    name = "\0kfuse-" + uuid.uuid4().hex
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        code = f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})\n"
        assert go(code, PROCESS).code == 0, "the attack itself must work"
        assert "ConnectionRefused" in go(code, namespace).stderr


def test_home_and_work_are_not_there(namespace: Tier, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.write_text("private")
    private.chmod(0o644)
    for path in (private, ROOT / "pyproject.toml", "/etc/passwd", "/etc/hostname", "/var", "/sys"):
        code = f"import os\nprint(os.path.lexists({str(path)!r}))"
        assert go(code, namespace).stdout == "False\n", path
    code = "import os\ntry: print(os.listdir(os.path.expanduser({!r})))\nexcept OSError: print([])"
    seen = go(code.format(str(Path.home())), namespace).stdout
    assert seen in ("[]\n", "['.pyenv']\n", "['main.py']\n"), "at most the way to the interpreter"


def test_nothing_outside_can_be_written(namespace: Tier, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("untouched")
    target.chmod(0o666)
    library = os.path.dirname(os.__file__)
    places = [
        str(target),
        "/usr/x",
        "/x",
        "/dev/x",
        f"{library}/x",
        "/proc/sys/kernel/core_pattern",
    ]
    for place in [*places, "/proc/sysrq-trigger", "/proc/1/oom_score_adj", os.__file__]:
        assert "Error" in go(f"open({place!r}, 'a').write('x')", namespace).stderr, place
    link = f"import os\nos.symlink({str(target)!r}, 'link')\nopen('link', 'r+').write('x')"
    assert "FileNotFoundError" in go(link, namespace).stderr
    assert target.read_text() == "untouched"
    assert not os.path.exists(f"{library}/x")


def test_all_mounts_but_the_folder_are_read_only(namespace: Tier) -> None:
    """So that the owner of the interpreter, too, cannot write to it."""
    lines = go("print(open('/proc/self/mounts').read())", namespace).stdout.split("\n")
    options = {line.split()[1]: line.split()[3].split(",") for line in lines if line}
    writable = {place for place, found in options.items() if "ro" not in found}
    assert {place for place in writable if not place.startswith("/dev/")} == {"/proc", "/tmp"}
    assert "/usr" in options
    assert all("nosuid" in found for place, found in options.items() if "/dev/" not in place)


def test_mounts_and_privileges_cannot_be_had_back(namespace: Tier) -> None:
    code = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None)\n"
        "status = dict(l.split(':\\t') for l in open('/proc/self/status').read().splitlines())\n"
        "print(os.getuid() != 0, int(status['CapBnd'], 16), status['NoNewPrivs'])\n"
        "print(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), libc.umount2(b'/', 2))\n"
        "print(libc.unshare(0x10000000), libc.unshare(0x20000), libc.ptrace(16, 1, 0, 0))\n"
        "try: os.setuid(0)\nexcept OSError: print('stays')\n"
        "try: os.mknod('disk', 0o60600, os.makedev(254, 0))\nexcept OSError: print('no device')\n"
    )
    found = go(code, namespace)
    assert found.stdout == "True 0 1\n-1 -1\n-1 -1 -1\nstays\nno device\n", found


def test_a_loop_and_a_sleep_end_in_time(tier: Tier) -> None:
    began = time.monotonic()
    found = go("while True: pass", tier, Limits(cpu_seconds=1))
    assert (found.ending, found.reason) == ("timeout", "1 s of processor time")
    found = go("import time\ntime.sleep(60)", tier, Limits(wall_seconds=0.2))
    assert (found.ending, found.reason) == ("timeout", "0.2 s of wall time")
    stubborn = "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, lambda *_: 0)\n"
    stubborn += "    except OSError: pass\nwhile True: pass"
    assert go(stubborn, tier, Limits(wall_seconds=0.2)).ending == "timeout"
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("stream", [1, 2])
def test_a_gigabyte_of_output_is_cut(tier: Tier, stream: int) -> None:
    flood = f"import os\nfor _ in range(1 << 14): os.write({stream}, b'x' * 65536)"
    found = go(flood, tier, Limits(output_bytes=1 << 18))
    assert found.ending == "output_limit"
    assert len(found.stdout) + len(found.stderr) == 1 << 18


def test_fifty_gigabytes_of_memory_are_refused(tier: Tier) -> None:
    found = go("bytearray(50 << 30)", tier)
    assert (found.ending, found.code) == ("exit", 1)
    assert "MemoryError" in found.stderr


def test_memory_of_many_processes_is_counted_together(namespace: Tier) -> None:
    code = (
        "import os, time\n"
        "for _ in range(6): os.fork()\n"
        "held = bytearray(b'x') * (24 << 20)\n"
        "time.sleep(5)\n"
    )
    found = go(code, namespace, Limits(memory_bytes=200 << 20, processes=64))
    assert found.ending == "memory"


def test_files_and_disk_and_core_are_limited(tier: Tier) -> None:
    limits = Limits(file_bytes=1 << 20, disk_bytes=4 << 20)
    found = go("open('big', 'wb').write(b'x' * (2 << 20))", tier, limits)
    assert "File too large" in found.stderr or found.code == signal.SIGXFSZ
    many = "for n in range(16): open(str(n), 'wb').write(b'x' * (1 << 19))"
    if tier.name == "namespace":
        assert "No space left" in go(many, tier, limits).stderr
    descriptors = "held = [open('/dev/null') for _ in range(1000)]"
    assert "Too many open files" in go(descriptors, tier).stderr
    crash = go("import ctypes\nctypes.string_at(0)", tier)
    assert (crash.ending, crash.code) == ("signal", signal.SIGSEGV)


def test_a_fork_bomb_is_contained(tier: Tier) -> None:
    if tier.name == "process" and AS_ROOT:
        pytest.skip("the system does not count root's processes: not promised in this tier")
    mark = uuid.uuid4().hex
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    found = go(bomb, tier, Limits(wall_seconds=0.5), mark)
    assert found.ending == "timeout"
    assert not alive(mark)


def test_a_fork_bomb_does_not_disturb_a_program_beside_it(namespace: Tier) -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    limits = Limits(wall_seconds=0.7)
    beside = threading.Thread(target=go, args=(bomb, namespace, limits))
    beside.start()
    time.sleep(0.2)
    code = "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0); print('forked')"
    assert go(code, namespace).stdout == "forked\n"
    beside.join()


def test_nothing_stays_alive_after_the_end(tier: Tier) -> None:
    mark = uuid.uuid4().hex
    daemon = (
        "import os, signal, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "        time.sleep(30)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print('started', flush=True)\n"
    )
    began = time.monotonic()
    found = go(daemon, tier, QUICK, mark)
    assert (found.ending, found.stdout) == ("exit", "started\n")
    assert time.monotonic() - began < 3
    assert not alive(mark)


def test_the_parent_cannot_be_killed(namespace: Tier) -> None:
    code = (
        "import os\n"
        "for number in (9, 15, 2, 19, 11):\n"
        "    for pid in (os.getppid(), 1):\n"
        "        try: os.kill(pid, number)\n"
        "        except OSError: pass\n"
        "print('still here')"
    )
    assert go(code, namespace).stdout == "still here\n"


def test_killing_the_watcher_is_no_way_out_of_being_counted() -> None:
    mark = uuid.uuid4().hex
    code = "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(9)"
    found = go(code, PROCESS, QUICK, mark)
    assert (found.ending, found.reason) == ("signal", "it killed its watcher")
    assert not alive(mark)


def test_a_stopped_watcher_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "GRACE", 0.2)
    mark = uuid.uuid4().hex
    code = "import os, time\nos.kill(os.getppid(), 19)\ntime.sleep(30)"
    assert go(code, PROCESS, Limits(wall_seconds=0.3), mark).ending == "signal"
    assert not alive(mark)


def test_it_ends_with_the_harness(tier: Tier, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    code = (
        "from harness.sandbox import Limits, Tier, run, interpreter\n"
        f"tier = Tier(name={tier.name!r})\n"
        "sleep = [interpreter(), '-c', 'import time; time.sleep(30)']\n"
        f"run([*sleep, {mark!r}], {{}}, Limits(), tier=tier)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    harness = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 5
    while not _children_run(mark, harness.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    harness.kill()
    harness.wait()
    time.sleep(0.2)
    assert not alive(mark)


def _children_run(mark: str, harness: int) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in words and path.parent.name != str(harness):
            return True
    return False


def test_without_namespaces_it_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sandbox.run

    def refused(*arguments: object, tier: Tier, **options: object) -> Outcome:
        if tier.name == "namespace":
            return Outcome(
                ending="infra", code=-1, stdout="", stderr="", seconds=0.0, cpu_seconds=0.0,
                tier="namespace", reason="unshare: Operation not permitted",
            )  # fmt: skip
        return real(*arguments, tier=tier, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sandbox, "run", refused)
    strongest.cache_clear()
    try:
        found = strongest()
    finally:
        strongest.cache_clear()
    assert found.name == "process"
    assert "not permitted" in found.reason
    assert "keep the network" in describe(found)
    assert "not permitted" in describe(found)
