"""Processes that do not outlive those that started them."""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # before a fork, not after it


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have Linux send this process a signal once the one that started it is gone; else nothing."""
    if _LIBC:
        _LIBC.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number))


__all__ = ["end_with_parent"]
