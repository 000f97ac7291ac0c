"""What goes between a mirror and its store: whole, in order, and none of it twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import RunError
from harness import mirror, objects
from harness.store import finish, home, read_manifest, write_json
from tests.harness.mirrors import files, made

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_manifest_is_sent_last_and_what_says_after_what_it_says(
    store: Path, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    put = objects.put

    def spy(fs: Any, root: str, given: Mapping[str, Path]) -> None:
        order.extend(given)
        put(fs, root, given)

    monkeypatch.setattr(objects, "put", spy)
    folder = made(at("first") / "models" / "one-00000000")
    finish(folder, {})
    (folder / ".partial").touch()
    mirror.send(folder)
    assert [Path(n).name for n in order] == ["one.bin", "index.json", "manifest.json"]
    order.clear()
    mirror.send(folder)
    assert order == [], "it is there"


DIES = """
import os, sys
from pathlib import Path
from harness import mirror, objects
put = objects.put
def dies(fs, root, given):
    if any(name.endswith("manifest.json") for name in given):
        os._exit(9)
    put(fs, root, given)
objects.put = dies
mirror.send(Path(sys.argv[1]))
"""


def test_who_dies_before_the_manifest_has_finished_nothing_and_sends_it_later(
    store: Path, at: Callable[[str], Path]
) -> None:
    folder = made(at("first") / "models" / "one-00000000")
    finish(folder, {})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", DIES, str(folder)], env=environment, cwd=ROOT)
    assert done.returncode == 9
    name = "models/one-00000000"
    assert set(files(store)) == {f"{name}/parts/one.bin", f"{name}/index.json"}
    (store / name / "old.bin").touch()  # which it had not come to remove
    other = at("second") / name
    mirror.learn(home())
    assert read_manifest(other) is None
    at("first")
    mirror.learn(home())
    at("second")
    mirror.learn(home())
    assert read_manifest(other) is not None
    assert not (store / name / "old.bin").exists()


def test_a_file_that_comes_in_part_is_not_there(
    store: Path, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(at("first") / "models" / "one-00000000")
    finish(folder, {})
    mirror.send(folder)
    other = at("second") / "models" / "one-00000000"
    fetch = objects.fetch

    def cut(fs: Any, root: str, given: Mapping[str, Path]) -> None:
        fetch(fs, root, given)
        for path in given.values():
            os.truncate(path, path.stat().st_size // 2)

    with monkeypatch.context() as patched:
        patched.setattr(objects, "fetch", cut)
        with pytest.raises(RunError, match="bytes of .* came.*run again"):
            mirror.bring(other)
    assert not files(other)
    assert not list(other.rglob("*.bin*"))
    mirror.bring(other)
    assert files(other) == files(folder)


def test_what_the_store_has_not_taken_whole_is_not_finished(
    store: Path, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(at("first") / "models" / "one-00000000")
    finish(folder, {})
    put = objects.put

    def cut(fs: Any, root: str, given: Mapping[str, Path]) -> None:
        put(fs, root, given)
        for name in given:
            os.truncate(store / name, (store / name).stat().st_size // 2)

    with monkeypatch.context() as patched:
        patched.setattr(objects, "put", cut)
        with pytest.raises(RunError, match="is not there as it was sent.*run again"):
            mirror.send(folder)
    at("second")
    mirror.learn(home())
    assert read_manifest(home() / "models" / "one-00000000") is None
    at("first")
    mirror.send(folder)
    assert files(store) == {f"models/one-00000000/{n}": b for n, b in files(folder).items()}


def test_changes_of_the_same_size_and_removals_reach_the_others(
    store: Path, at: Callable[[str], Path]
) -> None:
    first = made(at("first") / "models" / "one-00000000")
    mirror.send(first)
    second = at("second") / "models" / "one-00000000"
    mirror.bring(second)
    (second / "index.json").write_text((second / "index.json").read_text().replace("3", "4"))
    (second / "parts" / "one.bin").unlink()
    (second / "two.bin").write_text("two")
    mirror.send(second)
    at("first")
    mirror.bring(first)
    assert files(first) == files(second)
    (first / "two.bin").unlink()  # by hand, in a process that never saw it
    at("first")
    mirror.send(first)
    assert (store / "models" / "one-00000000" / "two.bin").exists()
    mirror.bring(first)
    assert files(first) == files(second)


def test_a_manifest_that_another_took_back_is_not_believed(
    store: Path, at: Callable[[str], Path]
) -> None:
    first = made(at("first") / "evaluations" / "one-00000000")
    finish(first, {})
    mirror.send(first)
    second = at("second") / "evaluations" / "one-00000000"
    mirror.learn(home())
    assert read_manifest(second) is not None
    mirror.remove(second / "manifest.json")
    at("first")
    mirror.learn(home())
    assert read_manifest(first) is None
    assert (first / "index.json").exists()


def test_a_mirror_belongs_to_one_store(
    store: Path, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    at("first")
    mirror.learn(home())
    monkeypatch.setenv("KFUSE_HOME", f"{store.as_uri()}-another")
    with pytest.raises(RunError, match=r"KFUSE_MIRROR: .*/first is the mirror of .*/store, not"):
        mirror.learn(home())


def test_a_store_that_is_lost_takes_no_mirror_with_it(
    store: Path, at: Callable[[str], Path]
) -> None:
    folder = made(at("first") / "models" / "one-00000000")
    finish(folder, {})
    mirror.send(folder)
    shutil.rmtree(store)
    with pytest.raises(RunError, match="is empty, but .*/first has 1 folders"):
        mirror.learn(home())
    assert read_manifest(folder) is not None


def test_without_a_url_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: str) -> Iterator[Any]:
        raise AssertionError

    monkeypatch.setattr(objects, "opened", never)
    monkeypatch.setenv("KFUSE_HOME", str(tmp_path))
    folder = made(home() / "models" / "one-00000000")
    mirror.learn(home())
    mirror.bring(folder)
    with mirror.sending(folder):
        mirror.send(folder)
    mirror.remove(folder / "index.json")
    assert [p.name for p in folder.iterdir()] == ["parts"]
    assert not (tmp_path / ".same").exists()


def test_a_mirror_without_a_name_is_in_the_cache_and_the_url_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KFUSE_MIRROR", raising=False)
    found = []
    for address in ("s3://bucket/one", "s3://bucket/one/", "s3://bucket/two"):
        monkeypatch.setenv("KFUSE_HOME", address)
        found.append(home())
    assert found[0] == found[1] != found[2]
    assert found[0].parent == tmp_path / "kfuse"


def test_a_manifest_goes_with_the_files_that_it_is_of(
    store: Path, at: Callable[[str], Path]
) -> None:
    folder = made(at("first") / "models" / "one-11111111")
    mirror.send(folder)
    there = store / "models" / "one-11111111" / "parts" / "one.bin"
    there.unlink()
    there.write_bytes(b"two" * 1000)  # another, who had the lock for a while
    finish(folder, {})
    mirror.send(folder)
    assert there.read_bytes() == b"one" * 1000


def test_what_goes_while_it_is_sent_keeps_nothing_else(
    store: Path, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(at("first") / "models" / "one-11111111")
    put = objects.put

    def late(fs: Any, root: str, given: Mapping[str, Path]) -> None:
        (folder / "parts" / "old.bin").unlink(missing_ok=True)
        put(fs, root, given)

    (folder / "parts" / "old.bin").write_bytes(b"old")
    monkeypatch.setattr(objects, "put", late)
    mirror.send(folder)
    assert set(files(store)) == {
        f"models/one-11111111/{n}" for n in ("parts/one.bin", "index.json")
    }


def test_a_store_that_was_emptied_in_order_is_used(store: Path, at: Callable[[str], Path]) -> None:
    folder = at("first") / "models" / "one-11111111"
    folder.mkdir(parents=True)
    write_json(folder / "failed.json", {"reason": "no"})
    mirror.send(folder)
    mirror.remove(folder / "failed.json")
    assert not files(store)
    mirror.learn(home())
