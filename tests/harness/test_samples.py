"""Endurance of records: kills, damage, two processes at once, a full disk."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import RunError
from harness import packing, samples
from harness.answering import answer, measure, packs
from harness.evaluate import load
from harness.plan import Plan, Step, plan
from harness.recipe import parse
from harness.samples import parts, spent
from harness.scores import rescore
from harness.scoring import Generation
from harness.store import read_manifest
from reports.parts import decode, encode
from reports.records import read_samples


class Deterministic:
    """A model that answers from the request's text alone, slowly enough to be killed."""

    engine = {"name": "deterministic"}
    notes = ["answers from the text alone"]

    def __init__(self, pause: float = 0.0) -> None:
        self.forward_tokens = 0
        self.pause = pause
        self.calls = 0

    def _number(self, request: Any) -> float:
        self.forward_tokens += 1
        return -random.Random(repr(request.args)).random() * 50

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
        self.calls += 1
        time.sleep(self.pause)
        return [(self._number(request), False) for request in requests]

    def generate(self, requests: list) -> list[Generation]:
        self.calls += 1
        texts = [
            f"the answer is {self._number(request):.0f}.{n}" for n, request in enumerate(requests)
        ]
        return [Generation(text, "length" if n == 0 else "stop", 7) for n, text in enumerate(texts)]


def planned(folder: Path, home: Path, suite: str = "tiny_choice") -> tuple[Plan, Step]:
    text = f"sources: {{model: {{path: {folder}}}}}\nevaluate: {{suites: [{suite}]}}\n"
    made = plan(parse(text + "reference: model\n", "r"), home)
    return made, made.evaluations("model")[0]


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHOICE_ITEMS", 1)


def contents(step: Step) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in [*parts(step.folder), step.folder / "scores.parquet"]}


@pytest.fixture
def whole(tiny: dict[str, Path], tmp_path: Path) -> dict[str, bytes]:
    """The files of an unbroken run."""
    made, step = planned(tiny["llama"], tmp_path / "whole")
    measure(made, step, load("tiny_choice", tmp_path, None, 17), Deterministic())
    assert len(parts(step.folder)) == 12
    return contents(step)


def child(tiny: dict[str, Path], home: Path) -> int:
    """A forked process that measures slowly; its number."""
    made, step = planned(tiny["llama"], home)
    loaded = load("tiny_choice", home, None, 17)
    number = os.fork()
    if number == 0:
        try:
            measure(made, step, loaded, Deterministic(0.01))
        finally:
            os._exit(0)
    return number


def test_killed_at_twenty_moments_the_records_are_the_same_bytes(
    tiny: dict[str, Path], tmp_path: Path, whole: dict[str, bytes]
) -> None:
    made, step = planned(tiny["llama"], tmp_path / "home")
    moments = random.Random(5)
    done, killed = 0, 0
    while killed < 20:
        process = child(tiny, tmp_path / "home")
        time.sleep(moments.uniform(0.0, 0.12))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        killed += os.WIFSIGNALED(status)
        there = len(parts(step.folder))
        assert there >= done, "what was written stays"
        done = there
        if read_manifest(step.folder):
            assert contents(step) == whole
            for path in step.folder.iterdir():
                path.unlink()
            done = 0
    lm = Deterministic()
    measure(made, step, load("tiny_choice", tmp_path, None, 17), lm)
    assert lm.calls == 12 - done
    assert contents(step) == whole


def test_two_processes_at_once_come_to_the_same(
    tiny: dict[str, Path], tmp_path: Path, whole: dict[str, bytes]
) -> None:
    _, step = planned(tiny["llama"], tmp_path / "home")
    for process in [child(tiny, tmp_path / "home") for _ in range(2)]:
        os.waitpid(process, 0)
    assert read_manifest(step.folder)
    assert contents(step) == whole
    assert not list(step.folder.glob(".*"))


def test_damage_is_named_and_only_that_pack_is_measured_again(
    tiny: dict[str, Path],
    tmp_path: Path,
    whole: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, step = planned(tiny["llama"], tmp_path / "home")
    loaded = load("tiny_choice", tmp_path, None, 17)
    measure(made, step, loaded, Deterministic())
    first, second, third, fourth = parts(step.folder)[:4]
    flipped = bytearray(first.read_bytes())
    flipped[len(flipped) // 3] ^= 1
    first.write_bytes(flipped)
    second.write_bytes(second.read_bytes()[:300])
    third.write_bytes(fourth.read_bytes())
    fourth.write_bytes(b"")
    (step.folder / "samples-00077.parquet").write_bytes(whole[third.name])
    with pytest.raises(ValueError, match=r"samples-00000.*evaluate again"):
        read_samples(step.folder)
    with pytest.raises(RunError, match=r"samples-00000.parquet: .*evaluate again"):
        rescore(made, step, loaded)
    (step.folder / "manifest.json").unlink()
    capsys.readouterr()
    lm = Deterministic()
    measure(made, step, loaded, lm)
    said = capsys.readouterr().err
    assert lm.calls == 4
    assert all(path.name in said for path in (first, second, third, fourth))
    assert "pack, items differ" in said or "items, pack differ" in said
    assert "samples-00077.parquet: no part of this measurement" in said
    assert (step.folder / "other-samples-00077.parquet").exists()
    assert contents(step) == whole


def test_every_flipped_bit_of_a_part_is_found(whole: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    data = whole["samples-00003.parquet"]
    draw = random.Random(3)
    for at in draw.sample(range(len(data)), 250):
        damaged = bytearray(data)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="."):
            decode(path)


def test_a_part_comes_back_as_it_was_written(tmp_path: Path, whole: dict[str, bytes]) -> None:
    path = tmp_path / "part.parquet"
    path.write_bytes(whole["samples-00003.parquet"])
    label, records = decode(path)
    del label["writer"]
    assert encode(records, label) == path.read_bytes()
    assert len(records[0]["protocol"]) == 12


def test_a_full_disk_is_named_and_costs_one_pack(
    tiny: dict[str, Path],
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, step = planned(tiny["llama"], tmp_path / "home")
    loaded = load("tiny_choice", tmp_path, None, 17)
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "samples-00005" in path.name:
            write(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match=r"samples-00005.*no space left.*what is finished is kept"):
        measure(made, step, loaded, Deterministic())
    assert len(parts(step.folder)) == 5
    assert not list(step.folder.glob(".samples*"))
    monkeypatch.setattr(Path, "write_bytes", write)
    lm = Deterministic()
    measure(made, step, loaded, lm)
    assert lm.calls == 7
    assert contents(step) == whole


def test_costs_add_up_over_interruptions_and_engine_and_notes_stay(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    made, step = planned(tiny["llama"], tmp_path / "home")
    loaded = load("tiny_choice", tmp_path, None, 17)
    asked = iter([True] * 4 + [False])
    answer(step, loaded, Deterministic(), going=lambda: next(asked))
    assert len(parts(step.folder)) == 4
    with (step.folder / samples.LEDGER).open("ab") as ledger:
        ledger.write(b'{"pack": 4, "sec')  # cut by a kill
    measure(made, step, loaded, Deterministic())
    manifest = read_manifest(step.folder)
    assert manifest
    assert len(spent(step.folder)) == manifest["cost"]["packs_measured"] == 12
    assert manifest["cost"]["tokens"] == sum(len(item.requests) for item in loaded.items)
    assert manifest["engine"] == Deterministic.engine
    assert manifest["notes"] == Deterministic.notes


def test_a_pack_whose_lock_was_taken_away_is_left_to_another(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, step = planned(tiny["llama"], tmp_path / "home")
    loaded = load("tiny_choice", tmp_path, None, 17)
    lm = Deterministic()

    def slow(requests: list, **_: object) -> list:
        for lock in (tmp_path / "home" / "running").glob("*.lock"):
            lock.write_text('{"token": "of another"}')
        return Deterministic().loglikelihood(requests)

    monkeypatch.setattr(lm, "loglikelihood", slow)
    with pytest.raises(RunError, match=r"pack-0: lost its lock to another process"):
        answer(step, loaded, lm)
    assert not parts(step.folder)
    assert not spent(step.folder)


def test_a_request_that_is_repeated_keeps_all_its_answers(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    made, step = planned(tiny["llama"], tmp_path / "home", "tiny_generate")
    loaded = load("tiny_generate", tmp_path, None, 17)
    for item in loaded.items:
        item.requests[0].repeats = 3
    measure(made, step, loaded, Deterministic())
    frame = read_samples(step.folder)
    assert {len(texts) for texts in frame.generation} == {3}
    assert {len(reasons) for reasons in frame.finish_reason} == {3}
    assert all(len(item.requests[0].resps) == 3 for item in loaded.items)
    assert len(packs(step, loaded)) == 1
    manifest = read_manifest(step.folder)
    assert manifest
    assert manifest["health"]["truncated"] == 1, "one of the three answers was cut"
    for item in loaded.items:
        item.requests[0].repeats = 20
    assert [len(pack.items) for pack in packs(step, loaded)] == [3, 3], "64 generations a pack"
