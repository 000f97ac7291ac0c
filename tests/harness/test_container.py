"""The container tier: what the runtime is told and what its ends mean, with a stand-in for it; and
hostile programs in real containers, where docker or podman works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusion.errors import RecipeError, RunError
from harness import sandbox
from harness.container import command_line, find
from harness.doctor import _sandbox, languages
from harness.execution import execute, fitness
from harness.recipe import parse
from harness.sandbox import Limits, Outcome, Tier, choose, describe, interpreter, run

QUICK = Limits(wall_seconds=4.0, cpu_seconds=2)

# Stands in for a runtime: says what it was told, then does what the container's shell would do,
# here and without any shutting in.
STAND_IN = """#!/bin/sh
if [ "$1" = image ]; then
    [ -e "$0.down" ] && { echo "cannot connect to the daemon" >&2; exit 1; }
    [ "$5" = known ] || { echo "no such image: $5" >&2; exit 1; }
    echo sha256:feed; exit 0
fi
if [ "$1" = rm ]; then echo "$*" >> "$0.log"; exit 0; fi
while [ "$1" != known ]; do shift; done; shift
cd "$(mktemp -d -p "$(dirname "$0")")"
exec sh "$@"
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with `docker` and `podman` that both stand in, alone on PATH with the system's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("docker", "podman"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    sandbox._found.cache_clear()
    yield folder
    sandbox._found.cache_clear()


def option(line: list[str], name: str) -> list[str]:
    return [line[at + 1] for at, word in enumerate(line) if word == name]


def test_the_runtime_is_told_every_limit() -> None:
    tier = Tier(name="container", program="/usr/bin/docker", image="known")
    limits = Limits(wall_seconds=7.5, cpu_seconds=3, memory_bytes=1 << 30, processes=20)
    line = command_line(["a", "b"], limits, {"GOMEMLIMIT": "1GiB"}, tier, "name", "word")
    assert line[:2] == ["/usr/bin/docker", "run"]
    for flag in ("--rm", "--read-only", "--interactive"):
        assert flag in line
    assert not {"--privileged", "--volume", "-v", "--mount", "--device"} & set(line)
    assert option(line, "--network") == ["none"]
    assert option(line, "--pull") == ["never"]
    assert option(line, "--cap-drop") == ["ALL"]
    assert option(line, "--security-opt") == ["no-new-privileges"]
    assert option(line, "--memory") == option(line, "--memory-swap") == [str(1 << 30)]
    assert option(line, "--pids-limit") == ["23"]
    bounds = dict(bound.split("=") for bound in option(line, "--ulimit"))
    assert bounds == {
        "cpu": "3:4",
        "fsize": f"{16 << 20}:{16 << 20}",
        "nofile": "256:256",
        "nproc": "23:23",
        "core": "0:0",
    }
    (writable,) = option(line, "--tmpfs")
    assert writable.startswith("/tmp:")
    assert f"size={64 << 20}" in writable
    uid, gid = map(int, option(line, "--user")[0].split(":"))
    assert uid == gid >= 20_000
    assert "GOMEMLIMIT=1GiB" in option(line, "--env")
    assert not any(name.startswith("PATH=") for name in option(line, "--env")), "the image's own"
    assert line[-5:] == ["word", "7.5", str(1 << 20), "a", "b"]
    assert line[line.index("--entrypoint") + 2] == "known"


@pytest.mark.parametrize(
    ("script", "limits", "expected"),
    [
        ("cat data/a; pwd >&2; exit 7", QUICK, ("exit", 7, "text")),
        ("exit 125", QUICK, ("exit", 125, "")),
        ("exit 124", QUICK, ("exit", 124, "")),
        ("kill -SEGV $$", QUICK, ("signal", 11, "")),
        ("kill -XCPU $$", QUICK, ("timeout", -1, "")),
        ("echo begun; sleep 1.2", Limits(wall_seconds=0.3), ("timeout", -1, "begun\n")),
        ("cat <&0; echo read", QUICK, ("exit", 0, "read\n")),
    ],
)
def test_how_the_shell_ended_is_how_the_program_ended(
    stand_in: Path, script: str, limits: Limits, expected: tuple
) -> None:
    tier = choose("container:known")
    files = {"data/a": "text", "p.sh": script}
    found = run(["sh", "p.sh"], files, limits, tier=tier)
    assert (found.ending, found.code, found.stdout) == expected, found
    assert found.tier == "container"
    assert found.seconds < 4


def test_output_is_cut_and_the_container_removed(stand_in: Path) -> None:
    tier = choose("container:known")
    found = run(["yes"], {}, Limits(output_bytes=1 << 16), tier=tier)
    assert found.ending == "output_limit"
    assert len(found.stdout) == 1 << 16
    log = (stand_in / "docker.log").read_text()
    assert re.fullmatch(r"rm --force kfuse-[0-9a-f]{16}\n", log)


def test_what_never_came_to_start_is_infra(stand_in: Path) -> None:
    tier = choose("container:known")
    found = run(["no-such-program"], {}, QUICK, tier=tier)
    assert (found.ending, found.reason) == ("infra", "no no-such-program in the image")
    (stand_in / "docker").write_text("#!/bin/sh\necho 'daemon died' >&2\nexit 125\n")
    found = run(["true"], {}, QUICK, tier=tier)
    assert (found.ending, found.reason) == ("infra", "daemon died")
    (stand_in / "docker").unlink()
    assert run(["true"], {}, QUICK, tier=tier).ending == "infra"


def test_the_first_runtime_that_works_is_taken(stand_in: Path) -> None:
    assert find("known") == Tier(
        name="container", program=str(stand_in / "docker"), image="known", image_id="sha256:feed"
    )
    (stand_in / "docker.down").touch()
    assert find("known").program == str(stand_in / "podman")
    assert f"known by {stand_in}/podman" in describe(find("known"))


def test_no_other_tier_is_taken_for_one_that_was_asked_for(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stand_in / "docker.down").touch()
    with pytest.raises(RunError, match=r"container:lost .*docker: cannot connect to the daemon.*"):
        choose("container:lost")
    monkeypatch.setenv("KFUSE_SANDBOX", "container:lost")
    assert "podman: no such image: lost" in _sandbox()
    assert "no program of any language can be judged" in next(languages())
    with pytest.raises(RunError, match="podman: no such image: lost"):
        execute([{"generation": ["x"], "doc": {"tests": []}}], allow=True)
    for name in ("docker", "podman"):
        (stand_in / name).unlink()
    monkeypatch.setenv("PATH", str(stand_in))
    with pytest.raises(RunError, match=r"no docker on PATH; no podman on PATH.*never pulled"):
        choose("container:known")


def test_the_recipe_comes_before_the_environment(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFUSE_SANDBOX", "container:known")
    assert choose().name == "container"
    assert choose("process").name == "process"
    monkeypatch.setenv("KFUSE_SANDBOX", "jail")
    with pytest.raises(RunError, match="KFUSE_SANDBOX=jail: unknown; known: namespace, process"):
        choose()
    text = "sources: {a: {path: x}}\nreference: a\nevaluate: {suites: [code], sandbox: SANDBOX}\n"
    found = parse(text.replace("SANDBOX", '"container:a/b:1"'), "r").evaluate
    assert found.sandbox == "container:a/b:1"
    assert "sandbox" not in found.results(), "where programs run does not name the measurement"
    with pytest.raises(RecipeError, match=r"evaluate.sandbox .*'jail'"):
        parse(text.replace("SANDBOX", "jail"), "r")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image made of this machine's sh, tar, sleep and Python; nothing is pulled."""
    name = f"kfuse-test-{uuid.uuid4().hex[:8]}"
    runtime = next((p for p in ("docker", "podman") if _answers(p)), None)
    if runtime is None or sys.platform != "linux":
        pytest.skip("neither docker nor podman works here; the stand-in was tested")
    path = tmp_path_factory.mktemp("image") / "root.tar"
    _root(path)
    made = subprocess.run([runtime, "import", path, name], capture_output=True, text=True)
    try:
        sandbox._found.cache_clear()
        if made.returncode:
            pytest.skip(f"{runtime} cannot make an image here: {made.stderr[-200:]}")
        try:
            choose(f"container:{name}")
        except RunError as error:
            pytest.skip(str(error))
        yield name
    finally:
        subprocess.run([runtime, "rmi", "--force", name], capture_output=True)


def _answers(runtime: str) -> bool:
    if not shutil.which(runtime):
        return False
    try:
        return not subprocess.run([runtime, "info"], capture_output=True, timeout=20).returncode
    except subprocess.TimeoutExpired:
        return False


def _root(path: Path) -> None:
    """A root folder as a tar archive: four programs and all that they load."""
    python = Path(interpreter())
    library = Path(os.path.realpath(os.__file__)).parent
    programs = [Path(os.path.realpath(shutil.which(n) or n)) for n in ("sh", "tar", "sleep")]
    needed = {
        Path("/bin") / name: p for name, p in zip(("sh", "tar", "sleep"), programs, strict=True)
    }
    needed[python] = python
    binaries = [*programs, python, *library.glob("lib-dynload/*.so")]
    listed = subprocess.run(["ldd", *binaries], capture_output=True, text=True).stdout
    needed |= {Path(p): Path(os.path.realpath(p)) for p in re.findall(r"(/\S+) \(0x", listed)}
    with tarfile.open(path, "w") as archive:
        for folder, mode in (("tmp", 0o1777), ("proc", 0o755), ("dev", 0o755), ("sys", 0o755)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            archive.addfile(entry)
        for place, file in needed.items():
            entry = archive.gettarinfo(file, str(place)[1:])
            entry.mode = 0o755
            with file.open("rb") as opened:
                archive.addfile(entry, opened)
        files = [*library.glob("*.py"), *library.glob("lib-dynload/*.so")]
        for package in ("collections", "ctypes", "encodings", "importlib", "re"):
            files += library.glob(f"{package}/*.py")
        for file in files:
            if file not in needed:
                entry = archive.gettarinfo(file, str(file)[1:])
                entry.mode = 0o644
                with file.open("rb") as opened:
                    archive.addfile(entry, opened)
        link = tarfile.TarInfo("usr/bin/python3")
        link.type, link.linkname = tarfile.SYMTYPE, str(python)
        archive.addfile(link)


def go(code: str, image: str, limits: Limits = QUICK) -> Outcome:
    command = ["python3", "-I", "-S", "main.py"]
    return run(command, {"main.py": code}, limits, tier=choose(f"container:{image}"))


# Each line is one attack and the word that says it was refused.
ATTACKS = """
import os, socket, ctypes
def refused(name, attack):
    try: attack()
    except OSError as error: print(name, type(error).__name__)
    else: print(name, "DONE")
libc = ctypes.CDLL(None)
refused("network", lambda: socket.create_connection(("1.1.1.1", 53), timeout=2))
refused("write", lambda: open("/etc/x", "w"))
refused("link", lambda: (os.symlink("/etc", "way"), open("way/y", "w")))
refused("home", lambda: os.listdir(HOME))
refused("root", lambda: os.setuid(0))
refused("device", lambda: os.mknod("disk", 0o60600, os.makedev(254, 0)))
print("mount", libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.umount2(b"/tmp", 2))
print("processes", sum(name.isdecimal() for name in os.listdir("/proc")))
print("secret", "SECRET_TOKEN" in os.environ)
for pid in (1, os.getppid()): os.kill(pid, 9)
print("alive")
"""


def test_attacks_in_a_real_container_are_refused(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    found = go(ATTACKS.replace("HOME", repr(str(Path.home() / "no"))), image)
    assert found.ending == "exit", found
    lines = found.stdout.splitlines()
    assert not [line for line in lines if line.endswith("DONE")], lines
    assert "mount -1 -1" in lines
    assert int(next(line for line in lines if line.startswith("processes")).split()[1]) <= 5
    assert "secret False" in lines
    assert lines[-1] == "alive"


def test_floods_bombs_and_loops_in_a_real_container_end(image: str) -> None:
    began = time.monotonic()
    flood = "import os\nwhile True: os.write(1, b'x' * 65536)"
    assert go(flood, image, Limits(output_bytes=1 << 18)).ending == "output_limit"
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    assert go(bomb, image, Limits(wall_seconds=0.5)).ending == "timeout"
    assert "MemoryError" in go("bytearray(50 << 30)", image).stderr
    disk = "for n in range(99): open(str(n), 'wb').write(b'x' * (1 << 20))"
    assert "No space left" in go(disk, image, Limits(disk_bytes=8 << 20)).stderr
    assert go("print(6 * 7)", image).stdout == "42\n"
    assert time.monotonic() - began < 60


def test_canaries_run_in_the_real_container_and_its_programs_are_judged(image: str) -> None:
    tier = choose(f"container:{image}")
    found = fitness("py", tier)
    assert found.reason is None
    assert re.fullmatch(r"3\.\d+\.\d+", found.version)
    assert (fitness("rb", tier).reason or "").startswith("no ruby in the sandbox")
    document = {"prompt": "", "tests": ["assert double(2) == 4"]}
    completions = ["def double(x):\n    return 2 * x\n", "def double(x):\n    return x\n"]
    judged = execute([{"generation": completions, "doc": document}], allow=True, tier=tier)
    assert judged == [["pass", "wrong"]]
