"""The store: folders named `<name>-<hash8>` that count once their manifest is there.

A folder without `manifest.json` is work in progress: it is resumed or redone. Files that matter are
written beside their place and renamed into it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fusion.errors import RunError

# Of a full disk, a failing one, or a share that is away: never a mistake of this code.
AWAY = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ENODEV,
    errno.ENXIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "lm-eval", "tokenizers", "numpy")


def home() -> Path:
    """`$KFUSE_HOME`, or `runs` in the working directory; of a URL its mirror on this machine.

    That is `$KFUSE_MIRROR`, or a folder in the user's cache (`harness.objects`).
    """
    address = url()
    if address is None:
        path = Path(os.environ.get("KFUSE_HOME") or "runs").absolute()
        if os.path.isfile(path):  # noqa: PTH113 - false also for a path that is too long
            raise RunError(f"KFUSE_HOME: {path} is a file; name a folder")
        return path
    if own := os.environ.get("KFUSE_MIRROR"):
        return Path(own).absolute()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "kfuse" / hashlib.sha256(address.encode()).hexdigest()[:16]


def made_home() -> Path:
    """`home()`, made if it is not there; RunError if it cannot be, or nothing can be written."""
    path = home()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        named = "KFUSE_MIRROR" if url() else "KFUSE_HOME"
        said = error.strerror or error
        raise RunError(
            f"{named}: nothing can be written into {path} ({said}); name another folder"
        ) from error
    return path


def url() -> str | None:
    """`$KFUSE_HOME` if it is the URL of an object store."""
    given = os.environ.get("KFUSE_HOME") or ""
    return given.rstrip("/") if "://" in given else None


def identity(content: Any) -> str:
    """sha256 of canonical JSON, so that key order does not matter."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder; None if it is missing or damaged."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def beside(path: Path) -> Path:
    """Where a file is written before it is renamed into its place: every process has its own."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


def write_text(path: Path, text: str) -> None:
    """One text file, whole or not at all."""
    partial = beside(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise world(error, path) from error


def space() -> str:
    """The kernel's name for what process numbers count in: containers may share a host's name."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def clock(folder: Path) -> float:
    """The time by the clock that stamps a folder's files: on a shared one the file server's.

    This machine's own where the folder takes no file.
    """
    path = beside(folder / f"clock.{threading.get_ident()}")
    try:
        path.touch()
        return path.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            path.unlink()


def finish(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest, which makes the folder count."""
    write_json(folder / "manifest.json", {**content, **provenance()})


@cache
def provenance() -> dict[str, Any]:
    """Package versions and this project's commit, for manifests."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"packages": versions | {"kfuse": metadata.version("kfuse")}, "commit": _commit()}


def unlike(made_by: Mapping[str, Any]) -> str | None:
    """Why what is made here would not be what is made by those versions; None if it would."""
    own, wanted = (
        {"commit": one["commit"] or unknown["commit"]} | one["packages"]  # None outside a checkout
        for one, unknown in ((provenance(), made_by), (made_by, provenance()))
    )
    differ = [f"{k} {own.get(k)} in place of {v}" for k, v in wanted.items() if own.get(k) != v]
    if not differ:
        return None
    return f"{socket.gethostname()}: has {', '.join(differ)}; install the same versions everywhere"


def _commit() -> str | None:
    import subprocess

    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def world(error: OSError, path: Path) -> RunError:
    """An operating-system error as a sentence with a remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(existing(path)).free / 2**30
        return RunError(
            f"{path}: no space left ({free:.2f} GiB free); make room or set KFUSE_HOME to another "
            "disk, then run again: what is finished is kept"
        )
    if error.errno in AWAY:
        return RunError(
            f"{path}: {error.strerror}; see to the disk, the share or the network, then run again: "
            "what is finished is kept"
        )
    return RunError(f"{path}: {error.strerror or error}")


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """RunError if less than `needed` bytes are free where `folder` lies."""
    free = shutil.disk_usage(existing(folder)).free
    if free < needed:
        raise RunError(
            f"{folder}: {purpose} needs about {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are "
            "free; make room or set KFUSE_HOME to another disk"
        )


def existing(path: Path) -> Path:
    """The nearest folder of a path that is there."""
    while not path.exists():
        path = path.parent
    return path
