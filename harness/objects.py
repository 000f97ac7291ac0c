"""The one door to object stores, through fsspec: `$KFUSE_HOME` as s3://, gs:// or abfs://.

What is to be read or was made goes through the mirror, a folder of this machine (`harness.mirror`);
here is what both sides of it and `harness.locks` ask of the store itself. Whatever a backend raises
is a RunError with a remedy. A lock is an object that is created exclusively and never written
again; its owner's signs of life are another object beside it, so that one who was taken for dead
and wakes overwrites nothing.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fusion.errors import RunError
from harness.store import home, url, world

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_PACKAGES |= dict.fromkeys(("abfs", "abfss", "az"), "adlfs")
# Where backends tell an object from an older one of its name: hashes, generations, times.
_TIMES = "mtime LastModified last_modified updated created"
_TAGS = f"ETag etag generation md5 content_md5 {_TIMES}"
_exclusive: set[str] = set()  # stores that were found to create exclusively
_guards: dict[str, float] = {}  # what keeps others from a lock, and when it was first seen


def name_of(path: Path) -> str | None:
    """What a file or folder of the mirror is called in the store; None if it never goes there.

    That is so without a URL, and for wheels and the hub's models, which each machine fetches.
    """
    if url() is None or not path.is_relative_to(home()):
        return None
    name = path.relative_to(home()).as_posix()
    return None if name.partition("/")[0] in ("absent", "wheels") else name


@contextmanager
def opened(what: str) -> Iterator[tuple[Any, str]]:
    """The store's file system and the path of its root; what goes wrong with them is a RunError."""
    address = url()
    assert address
    try:
        from fsspec.core import url_to_fs

        # Only a file system of folders has to make them; a listing is never remembered.
        local = {"auto_mkdir": True} if address.startswith(("file://", "local://")) else {}
        fs, root = url_to_fs(address, use_listings_cache=False, **local)
        yield fs, root.rstrip("/")
    except RunError:
        raise
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(address.partition("://")[0])
        remedy = f"pip install {package}" if package else "s3://, gs:// and abfs:// are such"
        raise RunError(f"KFUSE_HOME: {address}: {error}; {remedy}") from error
    except Exception as error:  # each backend raises what its client does
        raise _told(address, what, error) from error


def _told(address: str, what: str, error: Exception) -> RunError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return world(error, home())
    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    remedy = "is the network there? What is finished is kept: run again to go on"
    if isinstance(error, FileNotFoundError):
        remedy = "is there such a bucket? What is finished is kept: run again to go on"
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        remedy = "this machine needs the right to read, write, list and delete there"
    return RunError(f"{address}: {what} failed ({said}); {remedy}")


def listing(fs: Any, root: str, name: str) -> dict[str, dict[str, Any]]:
    """What the store has below a name, or of one, by name; work in progress left out."""
    fs.invalidate_cache()
    try:
        found = fs.find(f"{root}/{name}".rstrip("/"), detail=True)
    except FileNotFoundError:
        bucket = root.partition("/")[0]
        if bucket and not fs.exists(bucket):
            raise
        return {}
    out = {}
    for path, listed in found.items():
        own, info = path[len(root) :].lstrip("/"), listed or fs.info(path)
        if not hidden(own) and info.get("type") != "directory":
            out[own] = info
    return out


def gone(fs: Any, root: str, name: str) -> bool:
    """Whether there is no such object: some listings leave out what they cannot read."""
    try:
        fs.info(f"{root}/{name}")
    except FileNotFoundError:
        return True
    return False


def fetch(fs: Any, root: str, files: Mapping[str, Path]) -> None:
    """Download objects, by name, to files."""
    if files:
        fs.get([f"{root}/{name}" for name in files], [str(path) for path in files.values()])


def put(fs: Any, root: str, files: Mapping[str, Path]) -> None:
    """Upload files; what is interrupted is not there, which a file system of folders grants not."""
    from fsspec.implementations.local import LocalFileSystem

    targets = [f"{root}/{name}" for name in files]
    if files and not isinstance(fs, LocalFileSystem):
        fs.put([str(path) for path in files.values()], targets)
        return
    for target, path in zip(targets, files.values(), strict=True):
        folder, _, own = target.rpartition("/")
        partial = f"{folder}/.{own}.{uuid.uuid4().hex}"
        fs.put_file(str(path), partial)
        os.replace(partial, target)


def delete(fs: Any, root: str, name: str) -> None:
    """Remove an object, if it is there."""
    with suppress(FileNotFoundError):
        fs.rm_file(f"{root}/{name}")


def tag(info: Mapping[str, Any]) -> list[Any]:
    """An object's size, and what tells it from an older one of its name."""
    return [info["size"], next((str(info[name]) for name in _TAGS.split() if info.get(name)), "")]


def changed(info: Mapping[str, Any]) -> float:
    """When an object was written, by the store's clock; now, if that is not said."""
    found = next((info[name] for name in _TIMES.split() if info.get(name)), time.time())
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    return found.timestamp() if isinstance(found, datetime) else float(found)


def hidden(name: str) -> bool:
    """Whether a file is work in progress, which the store never gets."""
    return any(part.startswith(".") for part in name.split("/"))


def write(path: Path, text: str) -> None:
    """Put a small object, whatever is there."""
    with opened("writing") as (fs, root):
        fs.pipe_file(f"{root}/{name_of(path)}", text.encode())


def read(path: Path) -> str:
    """What a small object says; FileNotFoundError if there is none."""
    with opened("reading") as (fs, root):
        found = None
        with suppress(FileNotFoundError):
            found = fs.cat_file(f"{root}/{name_of(path)}")
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return str(found.decode())


def create(path: Path, text: str) -> bool:
    """Whether there was no such lock and now is; RunError if the store cannot tell."""
    with opened("locking") as (fs, root):
        if root not in _exclusive:
            probe = f"{root}/running/.probe.{uuid.uuid4().hex}"
            first, second = _create(fs, probe, "one"), _create(fs, probe, "two")
            with suppress(OSError):
                fs.rm_file(probe)
            if not first or second:
                raise RunError(
                    f"{url()}: does not create objects exclusively, so that two machines would "
                    "make the same; take a store that does (S3 with conditional writes, GCS, "
                    "Azure), or a folder that all share"
                )
            _exclusive.add(root)
        return _create(fs, f"{root}/{name_of(path)}", text)


def _create(fs: Any, path: str, text: str) -> bool:
    try:
        with fs.open(path, "xb") as file:
            file.write(text.encode())
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno == errno.EBUSY:  # another is creating it
            return False
        raise
    except (NotImplementedError, ValueError) as error:
        raise RunError(f"{url()}: cannot create objects exclusively ({error})") from error
    return True


def look(path: Path) -> tuple[str, str]:
    """What a lock says, and its owner's last sign of life; FileNotFoundError if there is none."""
    said, life = read(path), ""
    with suppress(FileNotFoundError):
        life = read(path.with_suffix(".life"))
    return said, life


def renew(path: Path, token: str) -> None:
    """Give a sign of life of a lock's owner, if the lock still is its own."""
    if token in read(path):
        write(path.with_suffix(".life"), uuid.uuid4().hex)


def remove(path: Path) -> None:
    """Remove a lock and its owner's signs of life, or another small object."""
    with opened("deleting") as (fs, root):
        for one in (path.with_suffix(".life"), path) if path.suffix == ".lock" else (path,):
            delete(fs, root, str(name_of(one)))


def take_away(path: Path, seen: tuple[str, int | str], lost: float) -> None:
    """Remove a lock that still is as it was seen: one remover at a time.

    lost: seconds after which a remover is taken for gone, by this machine's clock.
    """
    guard = path.with_suffix(".free")
    if not create(guard, uuid.uuid4().hex):
        with suppress(FileNotFoundError):
            other = read(guard)
            if time.monotonic() - _guards.setdefault(other, time.monotonic()) > lost:
                remove(guard)
        return
    try:
        with suppress(FileNotFoundError):
            if look(path) == seen:
                remove(path)
    finally:
        remove(guard)
