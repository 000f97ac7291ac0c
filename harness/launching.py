"""Training in several processes, on this host or with others."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from fusion.ending import STARTER, end_with_parent
from fusion.errors import RunError
from harness.progress import BEAT, lives, say, saying, signs, working
from harness.store import home

PATIENCE = 600  # seconds that hosts wait for each other
SEEN = 60.0  # seconds until what another host has written must be seen here
GRACE = 40  # seconds that torchrun has to end its processes, which it gives 30


def launch(
    job: Path, processes: int, hosts: int = 1, own: Callable[[], None] = lambda: None
) -> None:
    """Run a training job in several processes; RunError with the end of its output if it fails.

    hosts: more than one call others through the store (`harness.hosts`) and wait for them. own:
    called every few seconds, ends the training if it raises.
    """
    log = job.with_name("training.log")
    if hosts == 1:
        _torchrun(job, processes, ["--standalone"], log, own)
        _require(_written, job)
        return
    # As torchrun's users name the first host, if they do.
    address = os.environ.get("MASTER_ADDR") or socket.gethostname()
    call = {
        "id": uuid.uuid4().hex,
        "endpoint": f"{address}:{os.environ.get('MASTER_PORT') or _free_port()}",
        "hosts": hosts,
        "processes": processes,
        "job": str(job),
    }

    def together() -> None:
        own()
        _require_others(call)

    others = "another host" if hosts == 2 else f"{hosts - 1} other hosts"
    say(f"{job.parent.name}: with {others}, which `kfuse join` this recipe")
    with saying(training=call):
        _torchrun(job, processes, _meeting(call, first=True), log, together)
    _require(_written, job)


def help_out(call: dict[str, Any]) -> None:
    """Train with the host that calls; RunError as in `launch`."""
    job = Path(call["job"])
    _require(_look, job)
    log = job.with_name(f"training.{socket.gethostname()}.{os.getpid()}.log")
    others = partial(_require_others, call)
    with working(home(), f"joined-{call['id']}", training=call):
        _torchrun(job, call["processes"], _meeting(call, first=False), log, others)


def _require_others(call: dict[str, Any]) -> None:
    """RunError if a host of a training no longer gives a sign of life.

    Its processes would be waited for until PyTorch gives them up, after half an hour. Those that
    end in order, or whose connections break, need none of this.
    """
    for sign in signs(home()):
        own = (sign["host"], sign["pid"]) == (socket.gethostname(), os.getpid())
        if (sign.get("training") or {}).get("id") == call["id"] and not own and not lives(sign):
            raise RunError(
                f"training: {sign['host']} (process {sign['pid']}), which has a part in it, gives "
                f"no sign of life since {sign['age']:.0f} s; `kfuse run` and `kfuse join` go on "
                "from the last checkpoint"
            )


def _require(look: Callable[[Path], None], path: Path) -> None:
    """RunError if a look at a job's path finds something missing for as long as one waits.

    What another host has just written is not seen at once on every shared folder.
    """
    deadline = time.monotonic() + SEEN
    while True:
        try:
            return look(path)
        except RunError:
            if time.monotonic() > deadline:
                raise
        time.sleep(1.0)


def _look(path: Path) -> None:
    """RunError if this host does not see what a job names."""
    try:
        os.listdir(path.parent)  # asks the server, in place of what is remembered
        job = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read here ({error}); hosts share one store") from error
    named = [job["init"], job["corpus"]]
    for source in job["sources"]:
        named += [source[key] for key in ("model", "map", "store") if key in source]
    lost = [name for name in named if not Path(name).exists()]
    if lost:
        raise RunError(
            f"{lost[0]} is not on this host; hosts share the store at the same path, and models of "
            "the hub, too (HF_HOME)"
        )


def last_step(path: Path) -> int:
    """The last step of a log that another process may be writing; 0 if it has none yet."""
    try:
        with path.open(newline="") as lines:
            return max((int(row["step"]) for row in csv.DictReader(lines)), default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _written(job: Path) -> None:
    """RunError if training has left no whole model beside its job."""
    folder = job.parent
    os.listdir(folder)  # asks the server, in place of what is remembered
    files = {"config.json", "tokenizer_config.json", "training.csv"}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files |= set(json.loads(index.read_text())["weight_map"].values())
    else:
        files.add("model.safetensors")
    if lost := [name for name in sorted(files) if not (folder / name).exists()]:
        raise RunError(
            f"{folder}: training ended in order, and {', '.join(lost)} is not there; is the store "
            "shared, at the same path, by all hosts?"
        )


def _meeting(call: dict[str, Any], first: bool) -> list[str]:
    """torchrun's options for hosts that meet at the first one's address.

    That one's processes are the first, which write weights and log: it has the folder's lock.
    torchrun ranks hosts by what they call themselves, and `~` comes after all names.
    """
    name = call["endpoint"].rpartition(":")[0] if first else f"~{socket.gethostname()}"
    options = ["--local-addr", name, "--nnodes", str(call["hosts"]), "--rdzv-backend", "c10d"]
    options += ["--rdzv-id", call["id"], "--rdzv-endpoint", call["endpoint"]]
    wait = f"is_host={str(first).lower()},join_timeout={PATIENCE}"
    return [*options, "--rdzv-conf", wait]


def _torchrun(
    job: Path,
    processes: int,
    options: Sequence[str],
    log: Path,
    own: Callable[[], None] = lambda: None,
) -> None:
    # torchrun, because accelerate's own launcher starts several CPU processes only through MPI.
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    command += ["--nproc_per_node", str(processes), "-m", "fusion.training", str(job)]
    root = str(Path(__file__).resolve().parent.parent)
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    environment |= {"PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")}
    with log.open("w") as out:
        code = _run(command, out, environment, own)
    if code:
        said = log.read_text(errors="replace")
        if "RendezvousTimeoutError" in said:
            raise RunError(
                f"training: not all hosts came within {PATIENCE // 60} minutes; say `kfuse join` "
                f"with this recipe on each of the others, on the same store ({log})"
            )
        end = "\n".join(said.splitlines()[-15:])
        raise RunError(f"training ended with {code}; {log} ends:\n{end}")


def _run(
    command: Sequence[str], out: IO[str], environment: dict[str, str], own: Callable[[], None]
) -> int:
    """Run to its end; whatever ends this process, or is raised by what it asks, ends it, too.

    What went on would write into a folder that the next command takes for its own.
    """
    process = subprocess.Popen(
        command,
        stdout=out,
        stderr=subprocess.STDOUT,
        env=environment | {STARTER: str(os.getpid())},
        preexec_fn=end_with_parent,
    )
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(BEAT)
            own()
    except BaseException:
        process.terminate()  # torchrun ends its processes then, which it cannot once it is killed
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.kill()
        process.wait()
        raise


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
