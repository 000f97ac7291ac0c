"""Training in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fusion.errors import RunError


def launch(job: Path, processes: int) -> None:
    """Run a training job in several processes; RunError with the end of its output if it fails."""
    # torchrun, because accelerate's own launcher starts several CPU processes only through MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes)]
    root = str(Path(__file__).resolve().parent.parent)
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    environment |= {"PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")}
    log = job.with_name("training.log")
    with log.open("w") as out:
        done = subprocess.run(
            [*command, "-m", "fusion.training", str(job)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if done.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RunError(f"training ended with {done.returncode}; {log} ends:\n{end}")
