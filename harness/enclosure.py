"""The child's side of the sandbox: shut oneself in, start the program, watch it, say how it ended.

`harness.sandbox` starts this file as a program of its own (`python -I -S enclosure.py JOB`), as a
process that holds threads must not run Python between fork and exec. It is no module to import and
knows nothing of tests or outcomes. In the namespace tier there are three processes: this one
outside, the first process of a new pid namespace, which mounts and watches, and the program; when
the second ends, the kernel kills whatever the program has left behind. In the process tier this
one watches. Every line that it writes to the report descriptor is a JSON object.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import signal
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

# Numbers of the Linux interface, as its headers name them.
NEWNS, NEWUTS, NEWIPC = 0x00020000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 24, 36
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MNT_DETACH = 442, -100, 0x8000, 2
DEVICES = ("null", "zero", "full", "random", "urandom")
HOME = "/tmp"

LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """A function of the C library that answers -1 with errno on failure, as an OSError."""
    if getattr(LIBC, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def prctl(option: int, *values: int) -> None:
    call("prctl", option, *(ctypes.c_ulong(v) for v in (*values, 0, 0, 0, 0)[:4]))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    call(
        "mount",
        source.encode(),
        target.encode(),
        kind.encode(),
        ctypes.c_ulong(flags),
        options.encode(),
    )


def seal(path: str, recursive: bool) -> None:
    """Make a mount, or it and all below, read-only, without setuid and without devices."""
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, size)


class Report:
    """The pipe to the harness; the program never has it, as it closes on exec."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        os.set_inheritable(descriptor, False)

    def say(self, **facts: Any) -> None:
        with suppress(BrokenPipeError):  # without a harness, what it started must still be ended
            os.write(self.descriptor, (json.dumps(facts) + "\n").encode())


def throwaway() -> int:
    """A user id that nobody has: it owns nothing, and its processes can be counted and killed."""
    return 0x70000000 + random.SystemRandom().randrange(1 << 24)


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    prctl(PR_SET_DUMPABLE, 1)  # or /proc/self would belong to root


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def map_self(uid: int, gid: int) -> None:
    """In a fresh user namespace, be who one was outside: never root, so that exec drops all."""
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{uid} {uid} 1")
    write("/proc/self/gid_map", f"{gid} {gid} 1")


def separate() -> bool:
    """Enter new namespaces; True if as real root, False if inside a user namespace."""
    parts = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    if os.geteuid() == 0:
        try:
            call("unshare", parts)
            return True
        except PermissionError:
            become(throwaway())
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", parts | NEWUSER)
    map_self(uid, gid)
    return False


def furnish(job: dict[str, Any], files: dict[str, bytes], uid: int, gid: int) -> None:
    """Make the new root: read-only toolchain, five devices, own /proc, one small writable /tmp."""
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    root = job["folder"]
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in job["visible"]:
        _show(path, root)
    os.makedirs(f"{root}/dev")
    for name in DEVICES:
        write(f"{root}/dev/{name}", "")
        mount(f"/dev/{name}", f"{root}/dev/{name}", "none", MS_BIND)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"{root}/dev/{name}")
    os.symlink(HOME, f"{root}/dev/shm")
    os.makedirs(f"{root}/proc")
    try:
        mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except PermissionError:  # in a container whose own /proc is masked; most programs need none
        job["memory_bytes_watched"] = None
    home = root + HOME
    os.makedirs(home)
    options = f"size={job['disk_bytes']},nr_inodes=20000,mode=700,uid={uid},gid={gid}"
    mount("tmpfs", home, "tmpfs", MS_NOSUID | MS_NODEV, options)
    for name, content in files.items():
        os.makedirs(os.path.dirname(f"{home}/{name}"), exist_ok=True)
        with open(f"{home}/{name}", "wb") as file:
            file.write(content)
    for folder, folders, names in os.walk(home):
        for name in (*folders, *names):
            os.chown(f"{folder}/{name}", uid, gid)
    seal(root, recursive=False)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir(HOME)


def _show(path: str, root: str) -> None:
    """Let a path of the old root appear at the same place in the new one, read-only."""
    target = root + path
    if os.path.lexists(target) or not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        write(target, "")
    mount(path, target, "none", MS_BIND | MS_REC)
    seal(target, recursive=True)


def confine(job: dict[str, Any], uid: int | None) -> None:
    """Limits and privileges of the program, set by the process that will become it.

    uid: the throwaway user to become, if this is root and may change.
    """
    if uid is not None:
        become(uid)
        if job["namespaces"]:
            with suppress(OSError):  # processes are counted in it alone; it can forbid further ones
                call("unshare", NEWUSER)
                map_self(uid, uid)
    if job["namespaces"]:
        with suppress(OSError):  # a nested one would give back the right to mount
            write("/proc/sys/user/max_user_namespaces", "0")
    _limit(job)
    if sys.platform == "linux":
        for capability in range(64):
            try:
                prctl(PR_CAPBSET_DROP, capability)
            except OSError:
                break
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
        prctl(PR_SET_NO_NEW_PRIVS, 1)


def _limit(job: dict[str, Any]) -> None:
    cpu, size = job["cpu_seconds"], job["file_bytes"]
    wanted = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_FSIZE: (size, size),
        resource.RLIMIT_NOFILE: (job["open_files"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NPROC: (job["processes"],) * 2,
    }
    if job["limit_address_space"]:
        wanted[resource.RLIMIT_AS] = (job["memory_bytes"],) * 2
    for name, (soft, hard) in wanted.items():
        ceiling = resource.getrlimit(name)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(name, (soft, hard))
    with suppress(OSError):  # should the machine run out of memory, this goes first
        write("/proc/self/oom_score_adj", "1000")


def start(job: dict[str, Any], report: Report, uid: int | None) -> int:
    """Fork the process that becomes the program; its pid."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        confine(job, uid)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.umask(0o077)
        os.execvpe(job["command"][0], job["command"], job["environment"])
    except BaseException as error:
        report.say(ending="infra", reason=f"cannot start {job['command'][0]}: {error}")
    os._exit(127)


def attend(child: int, job: dict[str, Any], report: Report) -> None:
    """Wait until the program ends or must end, reap orphans meanwhile, and report the ending."""
    began = time.monotonic()
    ending: dict[str, Any] | None = None
    while ending is None:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            ending = {"ending": "exit" if code >= 0 else "signal", "code": abs(code)}
            ending["cpu_seconds"] = usage.ru_utime + usage.ru_stime
        elif pid == 0:
            left = began + job["wall_seconds"] - time.monotonic()
            if left <= 0:
                ending = {"ending": "timeout", "reason": f"{job['wall_seconds']} s of wall time"}
            elif job["memory_bytes_watched"] and resident() > job["memory_bytes_watched"]:
                ending = {"ending": "memory", "reason": "all its processes together"}
            elif _signalled(min(left, 0.05)) == signal.SIGTERM:
                ending = {"ending": "stopped"}
    report.say(seconds=time.monotonic() - began, **ending)


def _signalled(seconds: float) -> int | None:
    expected = {signal.SIGCHLD} if os.getpid() == 1 else {signal.SIGCHLD, signal.SIGTERM}
    if not hasattr(signal, "sigtimedwait"):  # macOS
        time.sleep(min(seconds, 0.01))
        pending = signal.sigpending() & {signal.SIGTERM}
        return signal.SIGTERM if pending else None
    found = signal.sigtimedwait(expected, seconds)
    return found.si_signo if found else None


def resident() -> int:
    """Bytes of memory that the processes of this pid namespace hold, without this one's."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdecimal() and name != "1":
            try:
                with open(f"/proc/{name}/statm") as file:
                    total += int(file.read().split()[1])
            except (OSError, IndexError):
                continue
    return total * resource.getpagesize()


def in_namespaces(job: dict[str, Any], files: dict[str, bytes], report: Report) -> None:
    """Run the program as the second process of its own pid namespace."""
    privileged = separate()
    uid = throwaway() if privileged else None
    owner, group = (uid, uid) if uid is not None else (os.geteuid(), os.getegid())
    first = os.fork()
    if first == 0:
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            prctl(PR_SET_DUMPABLE, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process is deaf to defaults
            furnish(job, files, owner, group)
            attend(start(job, report, uid), job, report)
        except BaseException as error:
            report.say(ending="infra", reason=f"no namespace: {error}")
        os._exit(0)
    while signal.sigwait({signal.SIGCHLD, signal.SIGTERM}) == signal.SIGTERM:
        os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)  # returns only when the kernel has emptied the namespace


def as_process(job: dict[str, Any], report: Report) -> None:
    """Run the program beside us, as another user if that is possible."""
    if sys.platform == "linux":
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    uid = throwaway() if job["drop"] else None
    if uid is not None:
        for folder, folders, names in os.walk("."):
            for name in (".", *folders, *names):
                os.chown(os.path.join(folder, name), uid, uid)
    child = start(job, report, uid)
    report.say(started=child)
    attend(child, job, report)
    _clear(child, uid)


def _clear(child: int, uid: int | None) -> None:
    """Kill what the program has left: its group, all of its user, all that came down to us."""
    if uid is not None and (killer := os.fork()) == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    elif uid is not None:
        os.waitpid(killer, 0)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        with suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        with suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
            for pid in file.read().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.002)
        except ChildProcessError:
            return


def main() -> NoReturn:
    job = json.loads(sys.argv[1])
    report = Report(job["report"])
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
        if sys.platform == "linux":
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if job["namespaces"]:
            files = {}
            for name in job["files"]:
                with open(os.path.join(job["folder"], name), "rb") as file:
                    files[name] = file.read()
            in_namespaces(job, files, report)
        else:
            as_process(job, report)
    except BaseException as error:
        report.say(ending="infra", reason=str(error) or type(error).__name__)
    os._exit(0)


if __name__ == "__main__":
    main()
