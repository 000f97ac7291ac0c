"""Printed averages against the columns typed beside them: a mistyped digit shows."""

from __future__ import annotations

import re
from itertools import pairwise
from math import nan
from pathlib import Path

import pytest

from tasks.published import DOMAINS, LLAMA2, LLAMA2_13B, PUBLISHED, Published
from tasks.published_chat import OPENCHAT, V1, V2, V3
from tasks.suite import known_suites, load_suite

TABLES = [(suite, table) for suite, tables in PUBLISHED.items() for table in tables]
NAMES = [f"{suite}: {table.paper}, {table.table}" for suite, table in TABLES]
# As printed: of a mean over grades, where a judge left some out, that over parts says little.
ODD = {("mt_bench", "GPT-4 (March)"): 0.032, ("mt_bench", "multi"): 0.0151}
RESEARCH = Path(__file__).parents[3] / "shared/research/fusellm.md"


@pytest.mark.parametrize(("suite", "table"), TABLES, ids=NAMES)
def test_printed_averages_are_the_means_of_their_columns(suite: str, table: Published) -> None:
    columns = [*table.tasks.values(), *table.averages.values(), *table.metrics.values()]
    assert all(len(values) == len(table.models) for values in columns)
    for number, (name, printed) in enumerate(table.averages.items()):
        kept = [values for t, values in table.tasks.items() if not (number and t in table.without)]
        kept = kept or list(table.metrics.values())  # of both turns
        for column, model in enumerate(table.models if kept else ()):
            mean = sum(values[column] for values in kept) / len(kept)
            # Both the entries and their mean are rounded to two decimals.
            allowed = ODD.get((suite, model), 0.0101)
            assert printed[column] == pytest.approx(mean, abs=allowed), (name, model)


def test_tables_name_the_tasks_of_their_suites() -> None:
    for name in set(PUBLISHED) & set(known_suites()):
        ours = {task.name for task in load_suite(name).tasks}
        for table in PUBLISHED[name]:
            assert set(table.tasks) in (ours, set()), name
            assert set(table.items) <= ours, name
    bbh = PUBLISHED["bbh@fusellm"][0]
    assert (len(bbh.tasks), sum(bbh.items.values())) == (27, 6511)
    assert [sum(table.items.values()) for table in PUBLISHED["mt_bench"]] == [80, 80]


def test_values_are_fractions_by_model() -> None:
    table, distilled = PUBLISHED["commonsense@fusellm"]
    found = table.of(LLAMA2)
    assert found["kfuse_boolq"] == pytest.approx(0.7771)
    assert found["average"] == pytest.approx(0.6376)
    assert table.of("someone/else") == {}
    assert distilled.of(LLAMA2_13B) == {"average": pytest.approx(0.6633)}


def test_grades_are_shares_of_ten() -> None:
    first, second = (table.of(OPENCHAT) for table in PUBLISHED["mt_bench"])
    assert (first["average"], first["kfuse_mt_bench_math"]) == pytest.approx((0.779, 0.53))
    assert second == pytest.approx({"average": 0.684, "first turn": 0.714, "second turn": 0.655})
    alpaca, third = PUBLISHED["alpaca_eval"]
    assert alpaca.of("sce") == pytest.approx({"kfuse_alpaca_eval": 0.1716, "win rate": 0.1152})
    assert third.of("google/gemma-2-9b-it") == {"kfuse_alpaca_eval": pytest.approx(0.511)}


def test_the_domains_average_to_what_is_printed() -> None:
    for name, (*domains, printed) in DOMAINS.rows.items():
        assert printed == pytest.approx(sum(domains) / 3, abs=1.01e-4), name
    assert len(DOMAINS.columns) == 4
    assert min(DOMAINS.rows, key=lambda row: DOMAINS.rows[row][-1]) == "FuseLLM"


def cells(section: str) -> list[list[str]]:
    """The rows of the tables of a section of the research notes, without heads."""
    text = RESEARCH.read_text()
    headings = [m.start() for m in re.finditer(r"^#{2,3} ", text, re.MULTILINE)] + [len(text)]
    (part,) = [text[a:b] for a, b in pairwise(headings) if text[a:b].startswith(f"### {section} ")]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def numbers(row: list[str]) -> tuple[float, ...]:
    return tuple(float(cell) for cell in row)


noted = pytest.mark.skipif(not RESEARCH.exists(), reason="no research notes here")


@noted
def test_fusechats_tables_are_as_noted() -> None:
    first = [numbers(row[1:]) for row in cells("2.5")[1:]]
    assert first == list(V1.values())
    second = [numbers(row[2:]) for row in cells("2.6")[1:]]
    assert second == list(V2.values())
    three = []
    for row in cells("2.7")[1:]:
        columns = [cell.split(" / ") if cell != "-" else ["nan"] * 3 for cell in row[1:]]
        three += [numbers([column[stage] for column in columns]) for stage in range(3)]
    assert str(three) == str(list(V3.values()))  # NaN is not itself
    assert len(first) + len(second) + len(three) == 16 + 20 + 15


@noted
def test_rows_stand_under_their_names() -> None:
    def key(name: str) -> str:
        alike = {"clm": "sft", "fusechat7bsce": "sce", "multifusellmstyle": "multi"}
        short = re.sub(r"[^a-z0-9]", "", name.lower().replace("(pivot)", ""))
        return alike.get(short, short)

    for section, table in (("2.5", V1), ("2.6", V2)):
        for (name, *_), model in zip(cells(section)[1:], table, strict=True):
            own = key(model.partition("/")[2] or model)
            words = re.findall(r"[a-z]{4,}", name.lower().replace("nh2", ""))
            assert own == key(name) or any(word in model.lower() for word in words), (name, model)


@noted
def test_the_distillation_table_is_as_noted() -> None:
    rows = {row[0]: numbers(row[1:]) for row in cells("2.4") if len(row) == 4 and row[1] != "BBH"}
    suites = ("bbh@fusellm", "commonsense@fusellm", "multipl_e@fusellm")
    names = {"Llama-2 13B": LLAMA2_13B, "Llama-2 7B": LLAMA2, "CLM": "clm"}
    names |= {"KD from 13B": "kd", "FuseLLM": "fusellm"}
    assert set(rows) == set(names)
    for noted_as, model in names.items():
        for suite, value in zip(suites, rows[noted_as], strict=True):
            found = [table.of(model).get("average", nan) for table in PUBLISHED[suite]]
            assert [v for v in found if v == v] == [pytest.approx(value / 100)], (suite, model)
