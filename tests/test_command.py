"""The command with bad input, interrupted, without space, and what it says of itself."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness import cli
from harness.execution import fitness
from harness.languages import LANGUAGES
from tests.test_pipeline import here
from tests.warm import ROOT, Warm, job


def test_an_interruption_says_how_to_go_on(tmp_path: Path) -> None:
    environment = os.environ | {"KFUSE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "harness.cli", "run", "tiny"]
    with subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr
        assert "fetch llama" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert "run the same command again" in said
    assert "Traceback" not in said


def bad(tmp_path: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    done = here("run", str(recipe), *arguments, home=tmp_path / "home")
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done


SMALL = """
sources: {{a: {{path: {path}}}}}
evaluate: {{suites: [tiny_text]}}
reference: a
"""


def test_mistakes_in_the_recipe_are_exit_2(tmp_path: Path) -> None:
    done = bad(tmp_path, SMALL.format(path="tiny:llama").replace("suites", "suits"))
    assert done.returncode == 2
    assert "evaluate.suits" in done.stderr
    assert "(suites?)" in done.stderr


@pytest.mark.parametrize(("path", "code"), [("/no/such/model", 1), ("tiny:giant", 2)])
def test_a_missing_model_is_told(tmp_path: Path, path: str, code: int) -> None:
    done = bad(tmp_path, SMALL.format(path=path))
    assert done.returncode == code
    assert path in done.stderr


def test_truncated_models_are_exit_1_and_do_not_count(
    tmp_path: Path, tiny: dict[str, Path]
) -> None:
    gguf = tmp_path / "cut.gguf"
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(40))
    done = bad(tmp_path, SMALL.format(path=gguf))
    assert done.returncode == 1
    assert "cut.gguf" in done.stderr
    assert not list((tmp_path / "home").glob("models/*/manifest.json"))
    folder = tmp_path / "model"
    shutil.copytree(tiny["llama"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    done = bad(tmp_path, SMALL.format(path=folder))
    assert done.returncode == 1
    assert "model" in done.stderr
    assert "damaged" in done.stderr


def test_a_small_corpus_and_a_broken_one_are_exit_1(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    text = (
        SMALL.format(path="tiny:llama")
        + f"corpus: {{path: {corpus}, blocks: 64, tokens: 100_000}}\n"
        + "variants: {clm: {train: {init: a}}}\n"
    )
    corpus.write_text(json.dumps({"text": "too short"}) + "\n")
    done = bad(tmp_path, text)
    assert done.returncode == 1
    assert "lower corpus.tokens" in done.stderr
    assert "clm" in done.stdout
    corpus.write_text("{broken\n")
    assert "corpus.jsonl" in bad(tmp_path, text).stderr


def test_no_space_left_is_exit_1(warm: Warm, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(SMALL.format(path="tiny:llama"))
    full = (
        "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from harness.cli import main; main()"
    )
    home = tmp_path / "home"
    said = tmp_path / "said"
    warm.start([job(full, said, ["run", str(recipe)], KFUSE_HOME=str(home))])
    assert warm.wait() == [1], said.read_text()
    assert "Traceback" not in said.read_text()
    assert not list(home.glob("*/*/manifest.json"))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_share_that_goes_away_is_exit_1_and_a_lost_file_of_ours_a_bug(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(of: int) -> None:
        raise OSError(of, os.strerror(of), str(tmp_path / "models"))

    monkeypatch.setattr(cli, "app", lambda: fails(number))
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path / 'models'}: ")
    assert "run again: what is finished" in said
    monkeypatch.setattr(cli, "app", lambda: fails(errno.ENOENT))
    with pytest.raises(FileNotFoundError):
        cli.main()


HELP = """
import sys
from harness.cli import main
sys.argv = ["kfuse", "--help"]
try:
    main()
finally:
    print(sorted({"lm_eval", "numpy", "pandas", "torch", "transformers"} & set(sys.modules)))
"""


def test_help_loads_nothing_heavy_and_teaches() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("\n[]\n"), done.stderr
    for word in ("run", "build", "evaluate", "report", "list", "doctor", "quickstart"):
        assert word in done.stdout


def test_list_and_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = here("list", home=tmp_path).stdout
    for word in ("min_ce", "linear", "packllm_sim", "bbh81", "2401.10491"):
        assert word in listed
    # All canaries are test_languages'; here are one language that is there and one that is not.
    absent = replace(LANGUAGES["rb"], version=("no-such-ruby", "--version"))
    spoken = {"js": LANGUAGES["js"], "rb": absent}
    monkeypatch.setattr("harness.languages.LANGUAGES", spoken)
    monkeypatch.setattr("harness.execution.LANGUAGES", spoken)
    fitness.cache_clear()
    try:
        examined = here("doctor", home=tmp_path).stdout
    finally:
        fitness.cache_clear()
    for word in ("memory", "devices", "hub", "sandbox", "torch"):
        assert word in examined
    python, node, ruby = examined.strip().splitlines()[-3:]
    assert re.fullmatch(r"Python +3\.\S+ +(namespace|process) +\d+\.\d\d  ok", python)
    assert node.startswith("JavaScript")
    assert re.match(r"Ruby +none +(namespace|process) +no no-such-ruby in the sandbox", ruby)
