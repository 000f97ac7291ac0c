"""The house's doors: which room may import which, and what may not be imported where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("fusion", "harness", "tasks", "reports")
ALLOWED = {"harness": set(ROOMS), **{room: {room} for room in ("fusion", "tasks", "reports")}}
HEAVY = {"torch", "transformers", "lm_eval"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    for path in files(room):
        forbidden = (imports(path) & set(ROOMS)) - ALLOWED[room]
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


@pytest.mark.parametrize("room", ["tasks", "reports"])
def test_measured_things_and_reports_know_no_models(room: str) -> None:
    for path in files(room):
        assert not imports(path) & HEAVY, path.relative_to(ROOT)


def test_lm_eval_stays_in_few_files() -> None:
    users = [path.name for path in files("harness") if "lm_eval" in imports(path)]
    assert users == ["evaluate.py", "scoring.py"]


def test_models_are_loaded_in_one_file() -> None:
    users = [
        path.name
        for room in ROOMS
        for path in files(room)
        if "AutoModelForCausalLM.from_pretrained" in path.read_text()
    ]
    assert users == ["models.py"]


@pytest.mark.parametrize("module", ["reports.table", "harness.cli", "harness.recipe"])
def test_light_modules_start_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
