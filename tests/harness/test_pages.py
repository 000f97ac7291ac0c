"""Pages hold what they say: their commands run, their recipes read, their tables are the code's.

A block's language says what is done with it, in the page's order and in one folder, whose `runs/`
is a store where `kfuse run tiny` is finished:

    console   lines that begin with `$ kfuse` run in this process; `# exit N` behind one says how it
              ends, if not with 0; lines below it must be among what it says, … for anything
    python    is executed; what one block defines, the next one knows
    yaml      a recipe (or a part of one, laid over `tiny`), a gate file, or a file of a suite
    text      is not executed

A block whose first line is a comment with a file's name becomes that file; one in `tasks/` goes to
a copy of that room.
"""

from __future__ import annotations

import glob
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_core import PydanticUndefined

import tasks
from fusion import spec
from fusion.functions import FUSION_FUNCTIONS
from fusion.merging import MERGE_METHODS
from harness import evaluate, heldout
from harness.pages import PAGES, listing, read_page, show, titles
from harness.recipe import BUNDLED, Evaluate, Judge, Recipe, _Loader, bundled, parse
from harness.rules import ENSEMBLE_RULES
from reports.formats import FORMATS
from reports.gate import Gate
from tasks import suite
from tasks.published import PUBLISHED
from tests.test_pipeline import here

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (kfuse .*?)(?:\s+# exit (\d))?$")
NAMED = re.compile(r"# (\S+\.(?:py|yaml))\n")
REGISTRIES: tuple[dict[str, Any], ...] = (FUSION_FUNCTIONS, MERGE_METHODS, ENSEMBLE_RULES, FORMATS)
TINY = yaml.load((BUNDLED / "tiny.yaml").read_text(), Loader=_Loader)


@pytest.fixture(scope="module")
def store(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store where the recipe `tiny` is built, measured and reported."""
    home = tmp_path_factory.mktemp("pages") / "store"
    shutil.copytree(tiny_run / "home", home)
    return home


@pytest.fixture
def place(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the store as `runs` and a copy of the room `tasks`, which suites come from."""
    (tmp_path / "runs").symlink_to(store)
    room = tmp_path / "tasks"
    shutil.copytree(suite.ROOM, room, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(tasks, "__path__", [str(room)])
    monkeypatch.setattr(tasks, "__file__", str(room / "__init__.py"))
    monkeypatch.setattr(suite, "ROOM", room)
    for module in (suite, evaluate, heldout):
        monkeypatch.setattr(module, "DEFINITIONS", room / "definitions")
    monkeypatch.chdir(tmp_path)
    before = [dict(registry) for registry in REGISTRIES]
    modules = set(sys.modules)
    yield tmp_path
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(content)
    for name in set(sys.modules) - modules:
        if name.startswith("tasks."):
            del sys.modules[name]


@pytest.mark.parametrize("page", list(titles()))
def test_what_a_page_shows_holds(page: str, place: Path) -> None:
    defined: dict[str, Any] = {"__name__": "page"}
    for language, text in BLOCK.findall(read_page(page)):
        name = NAMED.match(text)
        if name:
            (place / name[1]).write_text(text)
        if language == "console":
            execute(text, place / "runs")
        elif language == "python" and not name:
            exec(compile(text, f"{page}.md", "exec"), defined)
        elif language == "yaml" and not (name and name[1].startswith("tasks/")):
            read(text, page)
        else:
            assert language in ("python", "yaml", "text"), language


def execute(text: str, home: Path) -> None:
    """The commands of a block, each with the lines that it is said to print."""
    commands: list[tuple[str, int, list[str]]] = []
    for line in text.splitlines():
        found = COMMAND.match(line)
        if found:
            commands.append((found[1], int(found[2] or 0), []))
        elif line.strip():
            commands[-1][2].append(line)
    for command, code, expected in commands:
        words = [glob.glob(w) if "*" in w else [w] for w in shlex.split(command)[1:]]
        done = here(*(word for some in words for word in some), home=home)
        said = [" ".join(line.split()) for line in (done.stdout + done.stderr).splitlines()]
        assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
        for line in expected:
            pattern = re.escape(" ".join(line.split())).replace("…", ".*")
            assert any(re.fullmatch(pattern, one) for one in said), (command, line, said)


def read(text: str, page: str) -> None:
    """A YAML block, held to what it is for."""
    content = yaml.load(text, Loader=_Loader)
    if content.keys() >= {"sources", "evaluate", "reference"}:
        parse(text, page)
    elif "rules" in content:
        Gate.model_validate(content)
    elif content.keys() <= Recipe.model_fields.keys():
        part = {
            key: TINY[key] | value if key in TINY and isinstance(value, dict) else value
            for key, value in content.items()
        }
        parse(yaml.safe_dump(TINY | part), page)
    else:
        raise AssertionError(f"neither recipe nor gate: {', '.join(content)}")


def test_help_lists_the_pages_and_prints_one_as_it_is(tmp_path: Path) -> None:
    listed = here("help", home=tmp_path)
    assert listed.returncode == 0
    assert listed.stdout.strip() == listing()
    assert set(titles()) >= {"adding", "faults", "machines", "recipes", "reproduce", "statistics"}
    assert all(f"{name} " in listed.stdout and title for name, title in titles().items())
    shown = here("help", "recipes", home=tmp_path)
    assert shown.stdout == read_page("recipes")
    assert "kfuse help" in here("--help", home=tmp_path).stdout


def test_an_unknown_page_is_exit_2_with_a_close_match(tmp_path: Path) -> None:
    done = here("help", "recipe", home=tmp_path)
    assert done.returncode == 2
    assert "no page 'recipe'; pages: adding, " in done.stderr
    assert done.stderr.strip().endswith("(recipes?)")


def test_a_terminal_gets_a_page_without_its_marks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show("statistics")
    shown = capsys.readouterr().out
    assert "```" in read_page("statistics")
    assert "```" not in shown
    assert "| --- |" not in shown
    assert "kfuse compare" in shown


@pytest.mark.parametrize("page", list(titles()))
def test_a_page_is_short_and_almost_all_of_it_is_executed(page: str) -> None:
    text = read_page(page)
    assert text.startswith("# ")
    assert 60 <= len(text.splitlines()) <= 150
    languages = [language for language, _ in BLOCK.findall(text)]
    assert text.count("\n```") == 2 * len(languages)
    assert languages.count("text") <= 1 < len(languages)


TABLES: dict[type[spec.Section], tuple[str, str]] = {
    spec.Source: ("recipes", "sources"),
    spec.Corpus: ("recipes", "corpus"),
    spec.Train: ("recipes", "train"),
    spec.Fuse: ("recipes", "fuse"),
    spec.Merge: ("recipes", "merge, ensemble, repeat, keep"),
    spec.Ensemble: ("recipes", "merge, ensemble, repeat, keep"),
    spec.Repeat: ("recipes", "merge, ensemble, repeat, keep"),
    spec.Keep: ("recipes", "merge, ensemble, repeat, keep"),
    Evaluate: ("recipes", "evaluate"),
    spec.Machine: ("machines", "machine"),
    Judge: ("machines", "judge"),
}


@pytest.mark.parametrize("section", TABLES, ids=lambda section: section.__name__)
def test_tables_have_every_key_with_its_default(section: type[spec.Section]) -> None:
    page, heading = TABLES[section]
    part = re.split(r"^#+ ", read_page(page), flags=re.MULTILINE)
    (text,) = [one for one in part if one.partition("\n")[0] == heading]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE))
    for name, field in section.model_fields.items():
        told = rows[name]
        if field.default is PydanticUndefined:
            assert told == "required", name
            continue
        value = None if told == "–" else yaml.load(told, Loader=_Loader)
        wanted = list(field.default) if isinstance(field.default, tuple) else field.default
        assert value == wanted, name


def test_all_fourteen_faults_have_a_section_and_say_how_they_are_measured() -> None:
    parts = re.split(r"^## (\d+)\. ", read_page("faults"), flags=re.MULTILINE)
    assert parts[1::2] == [str(number) for number in range(1, 15)]
    for text in parts[2::2]:
        assert re.search(r"\bkfuse\b", text), text
        assert "Back" in text or "no setting" in text, text
        assert re.search(r"[Mm]easured (by|there)|[Nn]o row|nothing to measure", text), text


def test_what_fidelity_sets_is_named_in_full() -> None:
    text = read_page("faults")
    for key, value in spec.REFERENCE.items():
        assert f"`{key}`" in text or f"`{key}: {value}`" in text, key
        assert str(value) in text, value


def test_published_numbers_are_those_of_the_tables() -> None:
    line = re.compile(r"^\| `(\w+@fusellm)`(?:, (average[\w ]*))? \| (.*) \|$", re.MULTILINE)
    found = line.findall(read_page("reproduce"))
    assert len(found) == 4
    for name, average, cells in found:
        llama2, clm, fusellm, gain = map(float, cells.split(" | "))
        assert (llama2, clm, fusellm) == PUBLISHED[name][0].averages[average or "average"][2:]
        assert gain == pytest.approx(fusellm - clm, abs=0.005)


def test_pages_name_every_bundled_recipe_of_the_papers() -> None:
    text = read_page("reproduce")
    for name in bundled():
        if name.startswith("fuse"):
            assert f"`{name}`" in text, name


def test_pages_are_part_of_the_package() -> None:
    project = (PAGES.parent.parent / "pyproject.toml").read_text()
    assert '"pages/*.md"' in project
