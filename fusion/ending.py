"""Processes that do not outlive those that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
STARTER = "KFUSE_STARTER"  # names the process that started torchrun, to those that torchrun starts
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # before a fork, not after it


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have Linux send this process a signal once the one that started it is gone; else nothing."""
    if _LIBC:
        _LIBC.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number))


def end_with_torchrun() -> None:
    """Have Linux end this process with the torchrun that started it; SystemExit if that has gone.

    One that ends while this process still reads its modules would leave it behind: Linux tells only
    of parents that end after it was asked. Who started torchrun is named by `STARTER`, if anybody.
    """
    import psutil

    end_with_parent(signal.SIGKILL)
    if starter := os.environ.get(STARTER):
        try:
            gone = psutil.Process(os.getppid()).ppid() != int(starter)
        except psutil.NoSuchProcess:
            gone = True
        if gone:
            sys.exit("training: the torchrun that started this process has gone")


__all__ = ["STARTER", "end_with_parent", "end_with_torchrun"]
