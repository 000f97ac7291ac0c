"""Printed averages against the columns typed beside them: a mistyped digit shows."""

from __future__ import annotations

import pytest

from tasks.published import DOMAINS, LLAMA2, MODELS, PUBLISHED, Published
from tasks.suite import known_suites, load_suite


@pytest.mark.parametrize("table", PUBLISHED.values(), ids=PUBLISHED)
def test_printed_averages_are_the_means_of_their_columns(table: Published) -> None:
    assert all(len(values) == len(MODELS) for values in table.tasks.values())
    for number, (name, printed) in enumerate(table.averages.items()):
        kept = [t for t in table.tasks if not (number and t in table.without)]
        for column, model in enumerate(MODELS):
            mean = sum(table.tasks[task][column] for task in kept) / len(kept)
            # Both the entries and their mean are rounded to two decimals.
            assert printed[column] == pytest.approx(mean, abs=0.0101), (name, model)


def test_tables_name_the_tasks_of_their_suites() -> None:
    for name in set(PUBLISHED) & set(known_suites()):
        ours = {task.name for task in load_suite(name).tasks}
        assert set(PUBLISHED[name].tasks) == ours, name
    bbh = PUBLISHED["bbh@fusellm"]
    assert (len(bbh.tasks), sum(bbh.items.values())) == (27, 6511)


def test_values_are_fractions_by_model() -> None:
    found = PUBLISHED["commonsense@fusellm"].of(LLAMA2)
    assert found["kfuse_boolq"] == pytest.approx(0.7771)
    assert found["average"] == pytest.approx(0.6376)
    assert PUBLISHED["commonsense@fusellm"].of("someone/else") == {}


def test_the_domains_average_to_what_is_printed() -> None:
    for name, (*domains, printed) in DOMAINS.rows.items():
        assert printed == pytest.approx(sum(domains) / 3, abs=1.01e-4), name
    assert len(DOMAINS.columns) == 4
    assert min(DOMAINS.rows, key=lambda row: DOMAINS.rows[row][-1]) == "FuseLLM"
