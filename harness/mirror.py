"""The mirror: this machine's folder of a store that lies in an object store.

All work is on files of the mirror, which each machine has for itself. `learn` says what is finished
in the store, `bring` fetches a folder's files before they are read, `send` gives back what was
made, the manifest last. Without a URL as `$KFUSE_HOME` they do nothing.

What a file was when mirror and store last had the same is kept in the mirror's `.same/`, so that a
change here is told from one there. Of two changes the store's counts: who made it had the lock
later.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fusion.errors import RunError
from harness import objects
from harness.locks import Lost, holds, owned, require
from harness.objects import hidden, name_of
from harness.store import home, url, write_json

WEIGHTS = ("*.safetensors", "*.bin")  # what only those fetch who compute with it
EVERY = 60.0  # seconds between two sendings while a folder is worked on
ROOMS = ("distributions", "models", "evaluations")
TELLING = ("manifest.json", "failed.json")  # how a folder stands
SAYING = (".json", ".jsonl")  # ends of files that say what others hold
ALONE = "ledger.jsonl"  # several append to it under a lock of its own, so it goes by itself alone
SMALL = 64 * 2**20  # bytes up to which such a file is copied before it is sent

Entry = tuple[list[int], list[Any]]  # size and time of change here, size and tag there
_seen: set[str] = set()  # files that this process has seen here: one that goes was removed
_noting = threading.RLock()
_moving = threading.RLock()  # one sending or fetching at a time


def learn(store: Path, folder: Path | None = None) -> None:
    """Bring manifests and reasons of failures of all folders, or of one, and signs of who works.

    A folder that was finished here and could not be sent is sent now.
    """
    name = name_of(folder or store)
    if name is None:
        return
    unsent: list[Path] = []
    with objects.opened("listing") as (fs, root):
        there = objects.listing(fs, root, "" if name == "." else name)
        known = [p for room in ROOMS for p in (_claim() / room).glob("*.json") if _entries(p)]
        if name == "." and known and not there:
            raise RunError(
                f"{url()}: is empty, but {home()} has {len(known)} folders from there or of its "
                "own; if that is meant, delete the mirror, or rename it and set it as KFUSE_HOME"
            )
        _take(fs, root, {n: info for n, info in there.items() if _tells(n)})
        for path in _telling(folder):
            own = str(name_of(path))
            if own in there or not objects.gone(fs, root, own):
                continue
            same = _same(own).get(own)
            if same and _state(path) == same[0]:
                path.unlink(missing_ok=True)  # another took it back
                _note({own: None})
            elif same is None and path.name == "manifest.json":
                unsent.append(path.parent)
    for path in unsent:
        _send_finished(path)


def _send_finished(folder: Path) -> None:
    """Send what was finished here, unless another is at it, or has finished it by now."""
    if holds(home(), folder.name):
        send(folder, exact=True)
        return
    with owned(home(), folder.name, wait=False) as ours:
        if ours:
            with objects.opened("looking") as (fs, root):
                late = not objects.gone(fs, root, str(name_of(folder / "manifest.json")))
            if not late:
                send(folder, exact=True)


def _tells(name: str) -> bool:
    """Whether an object says how a folder or a job stands."""
    room, _, rest = name.partition("/")
    if room == "running":
        return name.endswith(".json")
    return room in ROOMS and rest.partition("/")[2] in TELLING


def _telling(folder: Path | None) -> list[Path]:
    """The mirror's files that say how a folder stands, or all that do."""
    if folder:
        return [path for name in TELLING if (path := folder / name).exists()]
    found = [p for r in ROOMS for n in TELLING for p in (home() / r).glob(f"[!.]*/{n}")]
    return sorted([*found, *(home() / "running").glob("[!.]*.json")])


def bring(path: Path, but: Sequence[str] = ()) -> None:
    """Fetch what the store has of a folder, or of one file, that the mirror has not, or older.

    A file comes whole or not at all. What others have removed goes here, too. but: patterns of
    names that are left out.
    """
    name = name_of(path)
    if name is None:
        return
    with _moving, objects.opened(f"fetching {name}") as (fs, root):
        there = objects.listing(fs, root, name)
        _claim()
        but = (*but, ALONE) if path.name != ALONE else ()
        left = {n for n in there if any(fnmatch(Path(n).name, pattern) for pattern in but)}
        _take(fs, root, {n: info for n, info in there.items() if n not in left})
        for own, (here, _) in _same(name).items():
            removed = _within(own, name) and own not in there and _state(home() / own) == here
            if removed and objects.gone(fs, root, own):
                (home() / own).unlink(missing_ok=True)
                _note({own: None})
        _seen.update(str(name_of(file)) for file in _files(path))


def _take(fs: Any, root: str, there: Mapping[str, dict[str, Any]]) -> None:
    """Fetch files that the mirror has not, or older; those that say what others hold last."""
    same = {n: entry for key in {_key(n) for n in there} for n, entry in _same(key).items()}
    wanted = []
    for name, info in there.items():
        state, known = _state(home() / name), same.get(name)
        if state is None or known is None or known[1] != objects.tag(info):
            wanted.append(name)
    wanted.sort(key=lambda n: (n.endswith("/manifest.json"), n.endswith(SAYING)))
    partial = {n: (home() / n).with_name(f".{Path(n).name}.{uuid.uuid4().hex}") for n in wanted}
    notes: dict[str, Entry | None] = {}
    try:
        for path in partial.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        objects.fetch(fs, root, partial)
        for name, path in partial.items():
            size = there[name]["size"]
            if path.stat().st_size != size:
                raise OSError(f"{path.stat().st_size} of {size} bytes of {name} came")
        for name, path in partial.items():
            if name.startswith("running/"):  # how old a sign is, its file says
                os.utime(path, (objects.changed(there[name]),) * 2)
            state = _state(path)
            path.replace(home() / name)
            notes[name] = (state or [], objects.tag(there[name]))
    finally:
        _note(notes)
        for path in partial.values():
            path.unlink(missing_ok=True)


def send(path: Path, exact: bool = False) -> None:
    """Give the store what the mirror has of a folder, or of one file, and it has not, or older.

    What says what other files hold is read before they are and sent after them, the manifest last,
    once all else is there. What this process has seen here and is gone is removed there; exact: all
    that is not here.
    """
    name = name_of(path)
    if name is None:
        return
    with (
        _moving,
        objects.opened(f"sending {name}") as (fs, root),
        TemporaryDirectory(dir=_claim()) as copies,
    ):
        said = dict(_copies(path, Path(copies)))
        found = {n: file for file in _files(path) if (n := str(name_of(file))) not in said}
        files = {n: (file, state) for n, file in found.items() if (state := _state(file))} | said
        if path.name != ALONE:
            files.pop(f"{name}/{ALONE}", None)
        there, known = objects.listing(fs, root, name), _same(name)
        # What is finished is all ours: another's part of it, left there, is replaced.
        sealed = f"{name}/manifest.json" in files
        new = {
            n: given
            for n, given in files.items()
            if n not in there
            or n not in known
            or known[n][0] != given[1]
            or (sealed and known[n][1] != objects.tag(there[n]))
        }
        last = {n: given for n, given in new.items() if n.endswith("/manifest.json")}
        first = {n: given for n, given in new.items() if n not in last}
        for some in (first.keys() - said.keys(), first.keys() & said.keys()):
            _put(fs, root, {n: first[n][0] for n in sorted(some)})
        seen = _seen | there.keys() if exact else _seen
        removed = [n for n in seen if _within(n, name) and not (home() / n).exists()]
        for own in removed:
            objects.delete(fs, root, own)
        _seen.difference_update(removed)
        _note(dict.fromkeys(removed))
        short = _sent(fs, root, name, first)
        if last and not short:
            objects.put(fs, root, {n: file for n, (file, _) in last.items()})
            short = _sent(fs, root, name, last)
        if last and short:
            raise OSError(f"{short[0]} is not there as it was sent")
        _seen.update(files)


def _put(fs: Any, root: str, files: dict[str, Path]) -> None:
    """Upload files; those that are removed meanwhile, as old checkpoints are, are left out."""
    while files:
        try:
            return objects.put(fs, root, files)
        except FileNotFoundError:
            left = {name: path for name, path in files.items() if path.exists()}
            if len(left) == len(files):
                raise
            files = left


def _copies(path: Path, to: Path) -> Iterator[tuple[str, tuple[Path, list[int]]]]:
    """Copies of the files that say what others hold, as they are now, with their states."""
    for file in _files(path):
        state, copy = _state(file), to / uuid.uuid4().hex
        if state and file.suffix in SAYING and state[0] <= SMALL:
            with suppress(FileNotFoundError):
                shutil.copyfile(file, copy)
                yield str(name_of(file)), (copy, [copy.stat().st_size, state[1]])


def _sent(fs: Any, root: str, name: str, files: Mapping[str, tuple[Path, list[int]]]) -> list[str]:
    """Write down which files the store now has as they were; the names of the others."""
    there = objects.listing(fs, root, name) if files else {}
    whole = {n: given for n, given in files.items() if there.get(n, {}).get("size") == given[1][0]}
    _note({n: (state, objects.tag(there[n])) for n, (_, state) in whole.items()})
    return [n for n in files if n not in whole]


def remove(path: Path) -> None:
    """Remove a file here and, if it came from there or was sent, in the store."""
    path.unlink(missing_ok=True)
    name = name_of(path)
    if name and name in _same(name):
        with objects.opened(f"deleting {name}") as (fs, root):
            objects.delete(fs, root, name)
        _note({name: None})


@contextmanager
def sending(folder: Path) -> Iterator[None]:
    """Send a folder's files each minute while this lasts, and what is there in the end.

    A machine that is lost then loses a minute's work. RunError if the end cannot be sent, or the
    folder's lock was lost, after which nothing is sent.
    """
    if name_of(folder) is None:
        yield
        return
    over = threading.Event()

    def beat() -> None:
        from harness.progress import say

        told = ""
        while not over.wait(EVERY):
            try:
                require(home(), folder.name)
                send(folder)
            except Lost:
                return
            except RunError as error:
                if not told:
                    say(f"{error} (tried again each minute)")
                told = str(error)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        over.set()
        if isinstance(error, Exception):  # who interrupts waits for no sending that is under way
            thread.join()
        with suppress(RunError):
            require(home(), folder.name)
            send(folder)
        raise
    over.set()
    thread.join()
    require(home(), folder.name)
    send(folder)


def _claim() -> Path:
    """The folder in which is written whose mirror this is; RunError if it is another store's."""
    path, address = home() / ".same" / "store.json", url()
    with _noting:
        try:
            known = json.loads(path.read_text())["url"]
        except (OSError, ValueError, KeyError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"url": address})
            return path.parent
    if known != address:
        raise RunError(
            f"KFUSE_MIRROR: {home()} is the mirror of {known}, not of {address}; name another "
            "folder, or leave it out"
        )
    return path.parent


def _files(path: Path) -> list[Path]:
    """A file, or the files of a folder, but for work in progress."""
    found = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    return [p for p in found if not hidden(str(name_of(p))) and p.is_file()]


def _within(name: str, above: str) -> bool:
    return name == above or name.startswith(f"{above}/")


def _state(path: Path) -> list[int] | None:
    """Size and time of change of a file; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _key(name: str) -> str:
    """The folder, or file, right below a room that a name belongs to."""
    return "/".join(name.split("/")[:2])


def _same(name: str) -> dict[str, Entry]:
    """What mirror and store had the same of the folder that a name belongs to."""
    return _entries(home() / ".same" / f"{_key(name)}.json")


def _entries(path: Path) -> dict[str, Entry]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _note(changes: Mapping[str, Entry | None]) -> None:
    """Write down what mirror and store have the same now, or no longer."""
    with _noting:
        for key in {_key(name) for name in changes}:
            own = {n: entry for n, entry in changes.items() if _key(n) == key}
            path = home() / ".same" / f"{key}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {n: entry for n, entry in (_same(key) | own).items() if entry})
