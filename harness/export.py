"""Write measurements in lm-eval's own form, for what reads that: results JSON, samples JSONL.

The stored records are given to lm-eval's run loop as if a model answered, so metrics, standard
errors, hashes and keys are lm-eval's; what kfuse knows beyond them stays in the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusion.errors import RunError
from harness import mirror
from harness.evaluate import write_as_lm_eval
from harness.measuring import load_suite_data
from harness.plan import Step
from harness.scores import filtered
from harness.store import home
from reports.records import Run


def export(runs: Sequence[Path], to: Path) -> list[Path]:
    """The files written below `to`, in a folder a row, as lm-eval names them.

    RunError for a folder that is no finished measurement, for a suite that executes programs
    (lm-eval has no outcomes of a sandbox), and where suite or data are not those measured.
    """
    made: list[Path] = []
    for folder in runs:
        mirror.bring(folder.absolute())
        try:
            manifest = Run.open(folder).manifest
        except (FileNotFoundError, ValueError) as error:
            raise RunError(str(error)) from error
        name, row = manifest["suite"], manifest["row"]
        loaded = load_suite_data(
            name,
            home(),
            manifest["limit"],
            manifest["seed"],
            manifest.get("heldout"),
            manifest.get("questions"),
        )
        if loaded.suite.executes_code:
            raise RunError(f"{folder}: {name} executes programs, which lm-eval's form cannot hold")
        if loaded.protocol != manifest["protocol"]:
            raise RunError(
                f"{folder}: measured with protocol {manifest['protocol']}, but {name} and its data "
                f"are {loaded.protocol} now; evaluate the row again"
            )
        key = manifest["identity"]
        step = Step("evaluate", name, folder, key, manifest["content"], rows=(row,))
        filtered(step, loaded)
        before = set(to.rglob("*.json*"))
        write_as_lm_eval(loaded, row, to / folder.name)
        found = sorted(set(to.rglob("*.json*")) - before)
        if not found:  # lm-eval logs a failure to write and goes on
            raise RunError(f"{to}: lm-eval could not write there; is it a folder with room?")
        made += found
    return made
