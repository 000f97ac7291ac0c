"""Machines with an object store between them: what one makes the others bring, whole, once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import RecipeError, RunError
from harness import mirror, objects, worker
from harness.build import build, make
from harness.capturing import capture_share
from harness.hosts import join
from harness.jobs import Job
from harness.locks import Lost, owned
from harness.model_folder import model_folder
from harness.plan import plan
from harness.progress import lives, signs, working
from harness.recipe import load, parse
from harness.run import run
from harness.store import finish, home, read_manifest, write_json
from harness.worker import Setting, do

ROOT = Path(__file__).resolve().parent.parent.parent
# What tells when or where something was made, and what it took.
OCCASION = ("manifest.json", "ledger.jsonl", "job.json", "training.csv", "header.json")
RECIPE = """
sources: {llama: {path: "tiny:llama"}}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 512}
variants:
  fused:
    train: {init: llama, fuse: {sources: [llama], function: min_ce, clm_weight: 0.9}}
    keep: {bits: exact, base: llama}
evaluate: {suites: [tiny_text], limit: 4}
reference: llama
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder behind a store that is named by a URL."""
    monkeypatch.setenv("KFUSE_HOME", f"file://{tmp_path / 'store'}")
    return tmp_path / "store"


@pytest.fixture
def at(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Be on a machine, with a mirror of its own."""

    def go(name: str) -> Path:
        monkeypatch.setenv("KFUSE_MIRROR", str(tmp_path / name))
        monkeypatch.setattr(mirror, "_seen", set())
        return tmp_path / name

    return go


def files(folder: Path) -> dict[str, bytes]:
    """Files by path, without work in progress and what a machine keeps for itself."""
    found = [p for p in folder.rglob("*") if p.is_file()]
    names = {str(p.relative_to(folder)): p for p in found}
    return {n: p.read_bytes() for n, p in names.items() if not objects.hidden(n)}


def made(folder: Path) -> Path:
    """A folder in which something was made, not finished yet."""
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "one.bin").write_bytes(b"one" * 1000)
    write_json(folder / "index.json", {"one": 3000})
    return folder


def test_one_machine_makes_and_measures_and_another_has_it(
    store: Path,
    at: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    first = at("first")
    assert run(str(recipe)) == 0
    there = files(store)
    assert not [name for name in there if name.startswith("running/")]
    assert [n for n in there if n.endswith("model.delta")]
    weights = [n for n in there if n.endswith(".safetensors")]
    assert {n.split("/")[1].partition("-")[0] for n in weights} == {"llama"}, "fused is kept"
    assert {n: there[n] for n in there if n in files(first)} == there
    capsys.readouterr()

    second = at("second")
    planned = plan(load(str(recipe)).recipe, home())
    assert all(step.done for step in planned.steps.values())
    assert not list(second.rglob("*.safetensors")), "weights come when they are read"
    before = {p: p.stat().st_mtime_ns for p in store.glob("[!r]*/*/*")}
    assert run(str(recipe)) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in store.glob("[!r]*/*/*")} == before
    assert list(model_folder(planned, "fused").glob("*.safetensors")), "from the difference"
    own = files(second)
    assert {n for n in weights if own[n] != there[n]} == set()

    cut = next(store.glob("evaluations/fused-*/samples-*.parquet"))
    os.truncate(cut, cut.stat().st_size - 1)
    at("third")
    assert run(str(recipe)) == 0
    assert "its items are measured again" in capsys.readouterr().err
    assert files(store)[str(cut.relative_to(store))] == there[str(cut.relative_to(store))]

    monkeypatch.setenv("KFUSE_HOME", str(tmp_path / "alone"))
    assert run(str(recipe)) == 0
    alone = files(tmp_path / "alone")
    rooms = ("distributions/", "models/", "evaluations/")
    assert {n for n in alone if n.startswith(rooms)} == {n for n in there if n.startswith(rooms)}
    for name, content in there.items():
        if name.startswith(rooms) and Path(name).name not in OCCASION:
            assert content == alone[name], name


def test_what_another_has_begun_is_gone_on_with(store: Path, at: Callable[[str], Path]) -> None:
    recipe = parse(RECIPE, "recipe")
    at("first")
    planned = plan(recipe, home())
    assert build(planned, ["llama"]) == {}
    (capture,) = (step for step in planned.builds() if step.kind == "capture")
    (pack,) = (step for step in planned.builds() if step.kind == "pack")
    assert make(planned, pack) is None
    capture_share(planned, capture, 0, 2)
    begun = files(store)
    assert any(n.endswith(".bin") for n in begun)

    at("second")
    planned = plan(recipe, home())
    (capture,) = (step for step in planned.builds() if step.kind == "capture")
    assert not capture.done
    assert make(planned, capture) is None
    after = files(store)
    shards = [n for n in begun if n.endswith(".bin")]
    assert {n: after[n] for n in shards} == {n: begun[n] for n in shards}
    assert not [n for n in after if "shard-" in n and n.endswith(".json")], "gathered"
    assert not [n for n in after if n.endswith("ledger.jsonl")], "it is in the manifest's cost"


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


def test_what_is_worked_on_is_sent_meanwhile_and_in_the_end(
    store: Path, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "EVERY", 0.02)
    folder = at("first") / "models" / "one-00000000"
    there = store / "models" / "one-00000000"
    with mirror.sending(folder):
        made(folder)
        while not (there / "index.json").exists():
            pass
    finish(folder, {})
    (folder / "two.bin").write_text("two")
    with pytest.raises(ZeroDivisionError), mirror.sending(folder):
        raise ZeroDivisionError
    assert (there / "two.bin").exists()
    assert (there / "manifest.json").exists()


def test_who_lost_a_folder_s_lock_sends_nothing_of_it(
    store: Path, at: Callable[[str], Path]
) -> None:
    folder = made(at("first") / "models" / "one-00000000")
    lock = home() / "running" / "one-00000000.lock"
    with owned(home(), folder.name), pytest.raises(Lost), mirror.sending(folder):
        objects.remove(lock)
    assert not files(store)


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


def test_a_worker_has_a_mirror_of_its_own_and_tells_why_it_cannot_see_the_store(
    store: Path, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = at("command")
    planned = plan(parse(RECIPE, "recipe"), home())
    sign = command / "running" / "sweep"
    setting = Setting.here(sign)
    assert "KFUSE_MIRROR" not in setting.environment
    fetch = next(step for step in planned.builds() if step.kind == "fetch")
    job = Job(fetch.identity, "make", fetch, "llama")
    node = at("node")
    assert "does not see the store" in str(do(planned, job, setting).unfit)
    objects.write(node / "running" / "sweep", "{}")
    done = do(planned, job, setting)
    assert (done.reason, done.unfit) == (None, None)
    assert list(node.glob("models/*/model.safetensors"))
    assert not list(command.glob("models/*"))
    (pack,) = (step for step in planned.builds() if step.kind == "pack")
    other = at("other")
    assert (
        do(planned, Job(pack.identity, "make", pack, "fused", pack.needs), setting).reason is None
    )
    assert list(other.glob("models/*/model.safetensors"))
    at("command")
    assert not pack.done
    mirror.learn(home())
    assert pack.done

    def broken(*_: object) -> dict:
        raise RunError("no room")

    monkeypatch.setitem(worker.WORK, "make", broken)  # type: ignore[arg-type]
    at("node")
    assert do(planned, job, setting).reason == "no room"


def test_hosts_that_train_together_need_a_folder(store: Path, at: Callable[[str], Path]) -> None:
    at("first")
    with pytest.raises(RecipeError, match=r"machine\.hosts: is 2, .* KFUSE_HOME is file://"):
        run("tiny", ["machine.hosts=2"])
    with pytest.raises(RecipeError, match=r"machine\.hosts: is 2"):
        join("tiny", ["machine.hosts=2"])


def test_signs_of_work_are_seen_from_elsewhere_and_go_again(
    store: Path, at: Callable[[str], Path]
) -> None:
    first = at("first")
    with working(first, "one-00000000"):
        while not list(store.glob("running/*.json")):
            pass
        second = at("second")
        mirror.learn(home())
        assert [sign["folder"] for sign in signs(second)] == ["one-00000000"]
        at("first")
    at("second")
    mirror.learn(home())
    assert signs(second) == []
    objects.write(second / "running" / "two.json", '{"folder": "two", "host": "elsewhere"}')
    os.utime(store / "running" / "two.json", (1e9, 1e9))
    mirror.learn(home())
    assert [lives(sign) for sign in signs(second)] == [False], "by when it was written there"


def test_what_was_finished_here_is_not_sent_while_another_is_at_it(
    store: Path, at: Callable[[str], Path]
) -> None:
    first = at("first")
    mine = made(first / "models" / "one-11111111")
    finish(mine, {"by": "first"})  # and could not be sent
    second = at("second")
    theirs = second / "models" / "one-11111111"
    (theirs / "checkpoints").mkdir(parents=True)
    (theirs / "checkpoints" / "s.bin").write_bytes(b"s")
    (theirs / "index.json").write_text("{}")
    mirror.send(theirs)
    before = files(store)
    lock = '{"host": "another", "space": "", "pid": 1, "born": 0, "token": "x"}'
    assert objects.create(second / "running" / "one-11111111.lock", lock)
    at("first")
    mirror.learn(first)
    after = files(store)
    assert {n: after[n] for n in before} == before
    assert "models/one-11111111/manifest.json" not in after
    objects.remove(first / "running" / "one-11111111.lock")
    mirror.learn(first)
    assert {n: data for n, data in files(store).items() if n.startswith("models/")} == {
        n: data for n, data in files(first).items() if n.startswith("models/")
    }, "nobody is at it any more: it is finished, and all of it is the first one's"


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


def test_a_sending_that_is_under_way_ends_before_the_lock_is_given_back(
    store: Path, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(at("first") / "models" / "one-11111111")
    begun, late = threading.Event(), threading.Event()
    send, sent = mirror.send, []

    def slow(path: Path, exact: bool = False) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            time.sleep(0.5)
        sent.append(late.is_set())
        send(path, exact)

    monkeypatch.setattr(mirror, "EVERY", 0.01)
    monkeypatch.setattr(mirror, "send", slow)
    with pytest.raises(ZeroDivisionError), mirror.sending(folder):
        _ = 1 / 0 if begun.wait(5) else None
    late.set()
    time.sleep(0.7)
    assert sent == [False, False]
