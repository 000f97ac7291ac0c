"""The whole loop on tiny models through the command line, and what happens to bad input."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from tests.warm import ROOT, Warm, command

ROWS = ["llama", "gemma", "neox", "clm", "fused", "merged", "pack"]


def kfuse(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = os.environ | {"KFUSE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "harness.cli", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)


def here(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has read the libraries; a bug is raised, not printed."""
    from harness.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        patch.dict(os.environ, KFUSE_HOME=str(home)),
        patch.object(sys, "argv", ["kfuse", *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as error:
            code = error.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def finished(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert "gains against clm" in (tiny_run / "said").read_text()
    home = tmp_path_factory.mktemp("run") / "home"
    shutil.copytree(tiny_run / "home", home)
    return home


def report(home: Path, suffix: str) -> Path:
    (path,) = home.glob(f"reports/tiny-*/report.{suffix}")
    return path


def test_from_yaml_to_report(finished: Path) -> None:
    table = pd.read_csv(report(finished, "csv"))
    suites = table[table.task.isna()]
    assert list(dict.fromkeys(suites.row)) == ROWS
    assert suites.score.notna().all()
    assert suites.signature.str.contains("model:").all()
    text = report(finished, "md").read_text()
    assert all(f"| {row} |" in text for row in ROWS)
    (path,) = finished.glob("evaluations/llama-tiny_code-*/manifest.json")
    sandbox = json.loads(path.read_text())["sandbox"]
    assert sandbox["tier"] in ("namespace", "process")
    assert sandbox["toolchains"].keys() == {"py"}
    page = report(finished, "html").read_text()
    differ = suites[suites.gain_low.notna()].suite.nunique()
    assert differ >= 2
    drawn = re.findall(r'<svg role="img" aria-label="(.*?) ', page)
    assert drawn.count("Gains") == differ
    assert drawn.count("Training:") == 3  # losses, and coverage
    for panel in (
        "items",
        "health",
        "contamination",
        "references",
        "wins",
        "quality",
        "costs",
        "provenance",
    ):
        assert f'<section id="{panel}"' in page
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])["items"]
    asked = {data["texts"][i["asked"][0]] for s in data["suites"] for i in s["items"]}
    assert any("the brook had left its bed" in prompt for prompt in asked)
    assert not re.search(r'(?:src|href)="(?!#)', page)


def test_again_does_nothing_and_says_so(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    done = kfuse("run", "tiny", home=finished)
    assert "nothing to do" in done.stderr
    same = [p for p in before if "reports" not in p.parts]
    assert all(p.stat().st_mtime_ns == before[p] for p in same)


def test_another_lambda_rebuilds_only_what_depends_on_it(finished: Path) -> None:
    done = here(
        "run", "tiny", "variants.fused.train.fuse.clm_weight=0.5", "--dry-run", home=finished
    )
    listed = done.stdout.split("to build:")[1]
    assert listed.startswith(" 2 folders")
    assert "train      fused" in listed
    assert "merge      merged" in listed


def test_a_report_is_the_same_bytes_from_the_same_records(finished: Path) -> None:
    before = report(finished, "md").read_bytes(), report(finished, "csv").read_bytes()
    assert here("report", "tiny", home=finished).returncode == 0
    assert (report(finished, "md").read_bytes(), report(finished, "csv").read_bytes()) == before


def test_only_builds_and_measures_one_row(tmp_path: Path) -> None:
    done = here("run", "tiny", "--only", "neox", "evaluate.suites=[tiny_text]", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name.split("-")[0] for p in (tmp_path / "models").iterdir()] == ["neox"]
    assert ": not run yet" in done.stdout
    assert here("run", "tiny", "--only", "neo", home=tmp_path).returncode == 2


def test_without_consent_no_code_runs_and_the_table_says_why(tmp_path: Path) -> None:
    arguments = ["evaluate.suites=[tiny_code]", "evaluate.allow_code_execution=false"]
    done = here("run", "tiny", "--only", "llama", *arguments, home=tmp_path)
    assert done.returncode == 0
    assert "allow_code_execution: true" in done.stdout
    assert not (tmp_path / "evaluations").exists()


def measured(home: Path) -> dict[str, bytes]:
    """Records, scores, weights and table of a store, as bytes."""
    files = [*home.glob("evaluations/*/*.parquet"), *home.glob("models/*/*.safetensors")]
    return {str(p.relative_to(home)): p.read_bytes() for p in [*files, report(home, "csv")]}


def test_killed_at_any_time_it_goes_on(warm: Warm, finished: Path, tmp_path: Path) -> None:
    moments = random.Random(8)
    killed, code = 0, -1
    home = tmp_path / "home"
    while code != 0:
        (process,) = warm.start([command(tmp_path / "said", "run", "tiny", KFUSE_HOME=str(home))])
        if killed < 8:
            time.sleep(moments.uniform(0.2, 0.6 + 0.6 * killed))
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        (code,) = warm.wait()
        assert code in (0, -signal.SIGKILL), (tmp_path / "said").read_text()
        killed += code != 0
    assert killed >= 4
    assert measured(home) == measured(finished)


def test_a_damaged_part_is_found_by_the_next_run_and_done_again(
    finished: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(finished, home)
    whole = measured(home)
    choice, generate, text, code = (
        next(home.glob(f"evaluations/llama-tiny_{suite}-*"))
        for suite in ("choice", "generate", "text", "code")
    )
    flipped = choice / "samples-00000.parquet"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    cut = generate / "samples-00000.parquet"
    cut.write_bytes(cut.read_bytes()[:-100])
    lost = text / "samples-00000.parquet"
    lost.unlink()
    (code / "scores.parquet").write_bytes(b"PAR1")
    (scored,) = home.glob("evaluations/gemma-tiny_text-*/scores.parquet")
    scored.write_bytes(scored.read_bytes() + b"x")
    dry = here("run", "tiny", "--dry-run", home=home)
    assert f"{flipped}: its bytes are not those" in dry.stderr
    assert (choice / "manifest.json").exists()
    reported = here("report", "tiny", home=home)
    assert reported.returncode == 0
    assert "scores.parquet: not a readable Parquet file" in report(home, "csv").read_text()
    assert f"{lost}: is gone; `kfuse run` mends it" in reported.stderr
    manifest = code / "manifest.json"
    manifest.write_text('{"kind": "evaluation"}')
    assert here("report", "tiny", home=home).returncode == 0
    before = {p: p.stat().st_mtime_ns for p in home.glob("evaluations/*/*.parquet")}
    done = here("run", "tiny", home=home)
    assert done.returncode == 0, done.stderr
    assert f"{flipped}: its bytes are not those that were written; its items" in done.stderr
    assert f"{cut}: has {cut.stat().st_size - 100} bytes, had {cut.stat().st_size}" in done.stderr
    assert f"{lost}: is gone; its items are measured again" in done.stderr
    assert re.search(
        rf"{manifest}: row, suite, .* missing.*; scores are derived again", done.stderr
    )
    assert re.search(rf"{scored}: has \d+ bytes, had \d+; scores are derived again", done.stderr)
    assert measured(home) == whole
    changed = {p for p in before if p.exists() and p.stat().st_mtime_ns != before[p]}
    scores = {folder / "scores.parquet" for folder in (choice, generate, text, code)}
    assert changed == {flipped, cut, scored, *scores}, "what was whole was not measured again"
    assert "nothing to do" in here("run", "tiny", home=home).stderr


COMPARISONS = """
sources: {llama: {path: "tiny:llama"}, gemma: {path: "tiny:gemma"}, neox: {path: "tiny:neox"}}
corpus: {path: "tiny:corpus", blocks: 64, tokens: 512}
variants:
  clm: {train: {init: llama}}
  self: {train: {init: llama, fuse: {sources: [llama], function: min_ce, clm_weight: 0.5}}}
  kd: {train: {init: llama, fuse: {sources: [gemma], function: min_ce, clm_weight: 0.5}}}
  second: {train: {init: kd, fuse: {sources: [neox], function: min_ce, clm_weight: 0.5}}}
  other: {train: {init: llama, fuse: {sources: [neox], function: min_ce, clm_weight: 0.5}}}
  pairwise: {merge: {base: llama, inputs: [kd, other], method: sce}}
  joint: {train: {init: llama, fuse: {sources: [llama, gemma, neox], function: avg_ce,
    level: span, vocabulary: statistics, clm_weight: {start: 0.5, end: 1.0}}}}
  chunks: {train: {init: llama, fuse: {sources: [gemma], function: min_ce, objective: alm,
    clm_weight: 0.5, online: true}}}
  faults: {train: {init: llama, fuse: {sources: [llama, gemma], fidelity: reference,
    clm_weight: 0.5}}}
evaluate: {suites: [tiny_text]}
reference: clm
"""


def test_the_comparisons_that_matter_are_recipes(tmp_path: Path) -> None:
    (tmp_path / "comparisons.yaml").write_text(COMPARISONS)
    home = tmp_path / "home"
    done = here("run", str(tmp_path / "comparisons.yaml"), home=home)
    assert done.returncode == 0, done.stderr
    (path,) = home.glob("reports/comparisons-*/report.csv")
    table = pd.read_csv(path)
    assert table[table.task.isna()].score.notna().all()
    trained = [p for p in home.glob("models/*/training.csv") if "clm" not in p.parent.name]
    assert len(trained) == 7
    assert all((pd.read_csv(p).coverage > 0.1).all() for p in trained)
    # A source that is run while training leaves no store; gemma's is of the rows that have one.
    assert len(list(home.glob("distributions/capture-gemma-*"))) == 2  # 16 and 10 entries kept


def test_models_of_one_tokenizer_share_its_maps(tiny: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny["gemma"], other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, other / "model.safetensors")
    home = tmp_path / "home"
    for name, path in (("one", tiny["gemma"]), ("two", other)):
        recipe = tmp_path / f"{name}.yaml"
        content = {
            "sources": {"llama": {"path": str(tiny["llama"])}, name: {"path": str(path)}},
            "variants": {"pack": {"ensemble": {"members": ["llama", name], "rule": "top1"}}},
            "evaluate": {"suites": ["tiny_text"]},
            "reference": "llama",
        }
        recipe.write_text(json.dumps(content))
        assert here("build", str(recipe), home=home).returncode == 0
        if name == "one":
            (made,) = home.glob("distributions/map-*/map.npz")
            made.write_bytes(b"made once")
    contents = [m.read_bytes() for m in home.glob("distributions/map-*/map.npz")]
    assert contents == [b"made once"] * 2


TALK = """
sources: {llama: {path: "tiny:llama"}, gemma: {path: "tiny:gemma"}, neox: {path: "tiny:neox"}}
corpus: {path: "tiny:conversations", blocks: 128, tokens: 640, heldout: HELDOUT}
variants:
  sft: {train: {init: llama, batch_blocks: 2, learning_rate: 1e-3}}
  own:
    train:
      {init: llama, batch_blocks: 2, learning_rate: 1e-3,
       fuse: {sources: [llama, gemma], function: min_ce, clm_weight: 0.5}}
  pivot:
    train:
      {init: llama, batch_blocks: 2, learning_rate: 1e-3,
       fuse: {sources: [gemma, neox], function: avg_ce, clm_weight: 0.5, template: pivot,
              alignment: dtw, vocabulary: statistics}}
  merged: {merge: {inputs: [own, pivot], base: llama, method: sce}}
evaluate: {suites: [response_bits_per_byte, tiny_talk]}
reference: sft
"""


def test_conversations_from_recipe_to_report(tmp_path: Path) -> None:
    from harness.tiny import make_corpus

    held = make_corpus(tmp_path / "held", "conversations")
    recipe = tmp_path / "talk.yaml"
    recipe.write_text(TALK.replace("HELDOUT", str(held)))
    done = here("run", str(recipe), home=tmp_path / "home")
    assert done.returncode == 1
    assert "neox/response_bits_per_byte: not measured" in done.stderr
    assert "has no chat template" in done.stderr
    (report,) = (tmp_path / "home" / "reports").glob("*/report.csv")
    rows = pd.read_csv(report)
    whole = (rows.suite == "response_bits_per_byte") & rows.task.isna()
    bits = rows[whole].set_index("row").score
    assert bits[["llama", "gemma", "sft", "own", "pivot", "merged"]].between(1, 3).all()
    assert bits["sft"] < bits["llama"]
    assert "no judge" in (report.parent / "report.md").read_text()
