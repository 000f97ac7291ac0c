"""Free-text answers: documents from real and broken rows, and metrics against the sets' own rules.

Oracles: lm-eval's stock prompts and its port of DROP's scorer; TriviaQA's own normalised aliases.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import lm_eval
import pytest
import yaml
from lm_eval.tasks.drop import utils as stock_drop

from fusion.errors import RunError
from harness.assets import prepare_data
from tasks import open_questions
from tasks.datasets import DATASETS
from tasks.questions import json_rows
from tasks.suite import DEFINITIONS


@pytest.fixture(scope="module")
def rules() -> ModuleType:
    """The definitions' functions, loaded as lm-eval loads them: by path."""
    spec = importlib.util.spec_from_file_location("rules", DEFINITIONS / "generation.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as rows:
        return [json.loads(line) for line in rows]


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("14", [["14"]]),
        ("14.0 yards", [["14"]]),
        ("the Lions", [["Lions"]]),
        ("Tom-Brady", [["Tom Brady"], ["Brady"]]),
        ("Brady", [["Tom Brady", "Manning"]]),
        ("Tom Brady", [["Tom Brady", "Manning"]]),
        ("12 yards", [["14 yards"]]),
        ("3,000 men", [["3000"]]),
        ("", [["14"]]),
        ("", [[""], ["x"]]),
        ("a", [["the"]]),
        ("nan", [["nan"]]),
    ],
)
def test_drop_is_scored_as_its_authors_do(
    rules: ModuleType, said: str, gold: list[list[str]]
) -> None:
    found = rules.drop({"gold": gold}, [said])
    stock = stock_drop.process_results({"answers": [tuple(a) for a in gold]}, [said])
    assert found == pytest.approx({"exact_match": stock["em"], "f1": stock["f1"]})


def test_drop_agrees_with_the_stock_scorer_on_real_answers(rules: ModuleType, shared: Path) -> None:
    rows = lines(shared / "data/drop/validation_1000.jsonl.gz")
    for row, other in zip(rows, rows[1:], strict=False):
        gold = row["answers"]
        words = row["passage"].split()[:6]
        for said in (gold[0][0], f"The {gold[0][0]}.", other["answers"][0][0], " ".join(words)):
            found = rules.drop({"gold": gold}, [said])
            stock = stock_drop.process_results({"answers": [tuple(a) for a in gold]}, [said])
            assert (found["exact_match"], found["f1"]) == (stock["em"], stock["f1"]), (said, gold)


def test_the_hubs_drop_columns_give_the_answers_that_lm_eval_takes() -> None:
    date = {"day": "", "month": "May", "year": "1999"}
    blank = {"day": "", "month": "", "year": ""}
    row = {
        "query_id": "q",
        "passage": "p",
        "question": "q?",
        "answer": {"number": "", "date": blank, "spans": ["a", "b"]},
        "validated_answers": {
            "number": ["3", "", "", "3"],
            "date": [blank, date, blank, blank],
            "spans": [[], [], ["a", "b"], []],
        },
    }
    (found,) = open_questions.drop([row])
    assert found["gold"] == [list(answer) for answer in stock_drop.get_answers(row)]
    assert found["gold"] == [["a", "b"], ["3"], ["May 1999"]]


def test_triviaqa_takes_its_authors_normal_form(rules: ModuleType) -> None:
    doc = {"gold": ["sunset boulevard", "st louis"]}
    for said, right in (("The Sunset Boulevard!", 1), ("St.Louis", 1), ("sunset_boulevard", 1)):
        assert rules.triviaqa(doc, [said]) == {"exact_match": right}
    for said in ("Sunset Boulevards", "", "a the"):
        assert rules.triviaqa(doc, [said]) == {"exact_match": 0.0}


def test_an_alias_of_triviaqa_is_right(rules: ModuleType, shared: Path) -> None:
    rows = lines(shared / "data/triviaqa/validation.jsonl.gz")
    said = [(row["answer"], alias) for row in rows for alias in row["answer"]["aliases"]]
    wrong = [
        alias
        for answer, alias in said
        if not rules.triviaqa({"gold": answer["normalized_aliases"]}, [alias])["exact_match"]
    ]
    # Of '+-*/', '@', "'A'a" and the like hardly anything stays; the set does not list that.
    assert (len(said), len(wrong)) == (127_038, 8)


def test_lambada_counts_the_first_word(rules: ModuleType) -> None:
    said = [" signs.", " signs” he", "signs", " sign", "", " ...", " signs'-"]
    found = rules.first_words([[text] for text in said], [{}] * len(said))
    right = [rules.lambada({"gold": "signs"}, answer)["exact_match"] for answer in found]
    assert right == [1, 1, 1, 0, 0, 0, 1]
    assert found[4] == found[5] == ["[invalid]"]


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        (" 50.7 atm", "50.7", 1),
        (" 53.2 atm", "50.7", 1),  # 4.7 % of the larger
        (" 53.5 atm", "50.7", 0),
        (" $2.9 \\times 10^{-23}$ s", "2.9e-23", 1),
        (" 2.9e-23", "2.9e-23", 1),
        (" \\boxed{89,034.79}, from 3", "89034.79", 1),
        (" 3, so \\boxed{7}", "7.0", 1),
        (" \u22122 m", "-2.0", 1),
        (" two", "2.0", 0),
        ("", "2.0", 0),
        (" 1 \\times 10^{99999}", "2.0", 0),
        (" 0", "0.0", 1),
        (" .5", "0.5", 1),
    ],
)
def test_scibench_takes_a_number_within_five_percent(
    rules: ModuleType, said: str, gold: str, right: int
) -> None:
    (found,) = rules.numbers([[said]], [{}])
    assert rules.scibench({"gold": gold}, found) == {"acc": right}


def test_a_power_of_ten_goes_from_the_unit_into_the_number() -> None:
    row = {"problem_text": "Q?", "source": "b", "problemid": "1"}
    units = ("$10^{-19} \\mathrm{~J}$", "$10^6$", "$10^{16}$ photons", "", " 10^{-5} m")
    found = list(
        open_questions.scibench([row | {"unit": u, "answer_number": "3.0"} for u in units])
    )
    assert [doc["gold"] for doc in found] == ["3e-19", "3.0", "3e+16", "3.0", "3e-05"]
    asked = [str(doc["prompt"]).splitlines()[0].removeprefix("Q: Q?") for doc in found]
    shown = ["$\\mathrm{~J}$", "$10^6$", "photons", None, "m"]
    assert asked == [f" The unit of the answer is {u}." if u else "" for u in shown]


def test_prompts_are_those_of_the_stock_tasks(shared: Path) -> None:
    root = Path(lm_eval.__file__).parent / "tasks"
    for folder, name, file in (
        ("triviaqa/default.yaml", "triviaqa", "triviaqa/validation.jsonl.gz"),
        ("drop/default.yaml", "drop", "drop/validation_1000.jsonl.gz"),
        ("lambada/lambada_openai.yaml", "lambada", "lambada/lambada_test.jsonl.gz"),
    ):
        text = (root / folder).read_text()
        stock = next(line for line in text.splitlines() if line.startswith("doc_to_text:"))
        template = jinja2.Template(yaml.safe_load(stock)["doc_to_text"])
        rows = lines(shared / "data" / file)[:200]
        render = getattr(open_questions, name)
        assert [doc["prompt"] for doc in render(rows)] == [template.render(**row) for row in rows]
        if name != "lambada":
            ours = yaml.safe_load(
                (DEFINITIONS / f"{name}.yaml").read_text().replace("!function", "")
            )
            found = yaml.safe_load(text.replace("!function", ""))
            assert ours["generation_kwargs"]["until"] == found["generation_kwargs"]["until"]


def test_translations_are_the_segments_of_both_archives(shared: Path) -> None:
    archives = [(shared / f"data/iwslt2017/{p}.tgz").read_bytes() for p in ("en-de", "de-en")]
    rows = list(open_questions.iwslt2017_rows(*archives))
    assert len(rows) == 1138
    assert rows[0] == {"id": "0", "en": "So this is James Risen.", "de": "Das ist James Risen."}
    with pytest.raises(ValueError, match=r"de-en.tgz: no whole archive"):
        list(open_questions.iwslt2017_rows(archives[0], archives[1][:5000]))
    with pytest.raises(ValueError, match=r"en-de.tgz: no whole archive with en-de/IWSLT17"):
        list(open_questions.iwslt2017_rows(archives[1], archives[0]))


def archive(pair: str, language: str, segments: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as made:
        member = tarfile.TarInfo(f"{pair}/IWSLT17.TED.tst2017.{pair}.{language}.xml")
        member.size = len(segments.encode())
        made.addfile(member, io.BytesIO(segments.encode()))
    return out.getvalue()


def test_archives_with_unlike_segments_are_refused() -> None:
    one = archive("en-de", "en", '<seg id="1"> A &amp; B </seg>\n<seg id="2">C</seg>')
    other = archive("de-en", "de", '<seg id="1">A und B</seg>')
    with pytest.raises(ValueError, match="do not hold the same segments"):
        list(open_questions.iwslt2017_rows(one, other))
    both = archive("de-en", "de", '<seg id="1">A und B</seg><seg id="2">D</seg>')
    assert list(open_questions.iwslt2017_rows(one, both))[0]["en"] == "A & B"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "drop",
            {"query_id": "7", "passage": "p", "question": "q", "answers": []},
            "7 has no answ",
        ),
        (
            "triviaqa",
            {"question_id": "7", "answer": {"normalized_aliases": []}, "question": "q"},
            "7",
        ),
        ("lambada", {"texts": "a b"}, "KeyError: 'text'"),
        ("lambada", {"text": "ends in a blank "}, "0 has no answer"),
    ],
)
def test_a_row_without_an_answer_or_a_column_is_named(
    tmp_path: Path, name: str, row: dict[str, Any], message: str
) -> None:
    file = {"drop": "validation_1000", "triviaqa": "validation", "lambada": "lambada_test"}[name]
    path = tmp_path / name / f"{file}.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    with pytest.raises(RunError, match=message) as caught:
        prepare_data([name], tmp_path / "home", tmp_path)
    assert f"cannot be read as {name}" in str(caught.value)


def test_a_word_problem_has_the_number_behind_its_last_mark() -> None:
    rows = [{"question": "Q?", "answer": "So 1 #### 2, no.\n#### 1,234"}]
    (found,) = open_questions.gsm8k(rows)
    assert (found["gold"], found["question"], found["answer"]) == (
        "1,234",
        "Q?",
        rows[0]["answer"],
    )
    with pytest.raises(ValueError, match="question 0 has no answer"):
        list(open_questions.gsm8k([{"question": "Q?", "answer": "1,234"}]))


def test_an_instruction_keeps_only_the_arguments_that_it_has() -> None:
    row = {"key": 7, "prompt": "P", "instruction_id_list": ["a:b", "c:d"]}
    (found,) = open_questions.ifeval([row | {"kwargs": [{"n": None}, {"n": 0, "m": None}]}])
    assert found["kwargs"] == [{}, {"n": 0}]
    assert (found["key"], found["prompt"], found["cluster"]) == (7, "P", "7")
    with pytest.raises(ValueError, match="shorter"):
        list(open_questions.ifeval([row | {"kwargs": [{}]}]))


def test_the_problems_that_are_here_are_as_many_as_there_should_be(shared: Path) -> None:
    for name in ("gsm8k", "gsm8k_train"):
        dataset = DATASETS[name]
        raw = (shared / "data" / dataset.files[0]).read_bytes()
        raw = gzip.decompress(raw) if dataset.files[0].endswith(".gz") else raw
        assert dataset.render
        assert len(list(dataset.render(json_rows(raw)))) == dataset.rows
