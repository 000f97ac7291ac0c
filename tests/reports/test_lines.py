"""Reference lines against scalar loops, and the reasons that stand where there is no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.lines import Line, lines
from reports.records import Run

TASKS = {"t1": 6, "t2": 4}
ROWS = [
    {"name": "a", "kind": "source"},
    {"name": "b", "kind": "source"},
    {"name": "unused", "kind": "source"},
    {
        "name": "fused",
        "kind": "train",
        "target": "a",
        "sources": ["b", "a"],
        "won": {"a": 3, "b": 9},
    },
]
A = [1, 1, 1, 0, 0, 0, 1, 0, 0, 0]
B = [0, 1, 0, 0, 1, 0, 1, 1, 1, 0]
FUSED = [1, 0, 1, 1, 1, 0, 1, 1, 0, 0]


def run(row: str, values: Any, bits: bool = False, **changes: Any) -> tuple[Run, pd.DataFrame]:
    metric = "bits_per_byte" if bits else "acc"
    tasks = [
        {
            "task": task,
            "metric": metric,
            "higher_is_better": not bits,
            "n_total": n,
            "protocol": "p",
        }
        for task, n in TASKS.items()
    ]
    names = [task for task, n in TASKS.items() for _ in range(n)]
    frame = pd.DataFrame(
        {
            "task": names,
            "doc_id": range(10),
            "cluster": [str(i) for i in range(10)],
            "value": np.array(values, float),
            "weight": np.arange(1.0, 11.0) if bits else 1.0,
        }
    )
    manifest = {"row": row, "suite": "s", "protocol": "p1", "tasks": tasks} | changes
    return Run(Path(), manifest), frame


def found(
    rows: list[dict[str, Any]] = ROWS, bits: bool = False, **values: Any
) -> dict[tuple[str, str], Line]:
    opened = {
        (name, "s"): given if isinstance(given, tuple) else run(name, given, bits)
        for name, given in values.items()
    }
    out = lines({"rows": rows, "suites": [{"name": "s"}]}, opened)
    assert len({(line.row, line.name, line.detail) for line in out}) == len(out)
    return {(line.row, line.name): line for line in out}


def test_what_each_line_says() -> None:
    got = found(a=A, b=B, fused=FUSED)
    # a: 3/6 and 1/4; b: 2/6 and 3/4; the best for each task: a on t1, b on t2.
    best = got["", "best single source"]
    assert (best.value, best.detail) == (pytest.approx((2 / 6 + 3 / 4) / 2), "b")
    tasks = got["", "task oracle"]
    assert tasks.value == pytest.approx((3 / 6 + 3 / 4) / 2)
    assert tasks.detail == "a on 1, b on 1 of 2 tasks"
    oracle = got["", "item oracle"]
    assert oracle.value == pytest.approx((4 / 6 + 3 / 4) / 2)
    gap = got["fused", "gap recovered"]  # b is bettered on two of ten items: many draws lack both
    assert (gap.value, gap.reason.partition(":")[0]) == (None, "no gap to speak of")
    lost = got["fused", "forgotten"]
    assert (lost.value, lost.n, lost.detail) == (1 / 4, 4, "1 of 4 that a had right")
    new = got["fused", "emergent"]
    assert (new.value, new.n, new.detail) == (1 / 3, 3, "1 of 3 that no source had right")
    for line in (best, tasks, oracle, lost, new):
        assert line.low is not None
        assert line.high is not None
        assert line.low < line.value < line.high  # type: ignore[operator]
    # A source that nothing draws on is a row like any other, and has no target.
    assert ("unused", "gap recovered") not in got


def test_a_gap_that_most_draws_have_is_a_share_of_the_way() -> None:
    a, b = [1, 1, 1, 0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1, 0, 1, 0, 1]
    gap = found(a=a, b=b, fused=[1, 1, 1, 1, 1, 1, 1, 0, 1, 0])["fused", "gap recovered"]
    assert gap.value == pytest.approx((0.75 - 0.5) / (1 - 0.5))
    assert gap.low is None  # a few draws have no gap, and no share of it


def test_shares_of_blocks_come_from_the_training() -> None:
    out = lines({"rows": ROWS, "suites": []}, {})
    assert [(x.detail, x.value, x.n) for x in out] == [
        ("a: 3 of 12", 0.25, 12),
        ("b: 9 of 12", 0.75, 12),
    ]
    assert out[0].low is not None
    assert 0 < out[0].low < 0.25


def test_bits_go_down_weigh_by_bytes_and_know_no_right_and_wrong() -> None:
    a, b = np.linspace(1, 2, 10), np.linspace(2, 1, 10)
    got = found(bits=True, a=a, b=b, fused=np.minimum(a, b))
    weight = np.arange(1.0, 11.0)
    oracle = [np.average(np.minimum(a, b)[s], weights=weight[s]) for s in (slice(6), slice(6, 10))]
    assert got["", "item oracle"].value == pytest.approx(np.mean(oracle))
    assert got["", "best single source"].value == pytest.approx(
        min(
            np.mean([np.average(v[s], weights=weight[s]) for s in (slice(6), slice(6, 10))])
            for v in (a, b)
        )
    )
    gap = got["fused", "gap recovered"]
    assert (gap.value, gap.low, gap.high) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    assert not {name for _, name in got} & {"forgotten", "emergent"}


@settings(max_examples=5)
@given(*(st.lists(st.integers(0, 1), min_size=10, max_size=10) for _ in range(3)))
def test_oracles_are_ordered_and_the_best_source_recovers_nothing(
    a: list[int], b: list[int], fused: list[int]
) -> None:
    rows = [*ROWS, {"name": "copy", "kind": "merge", "sources": ["a", "b"], "target": "a"}]
    first = found(rows, a=a, b=b, fused=fused)
    best, tasks, items = (
        first["", name].value for name in ("best single source", "task oracle", "item oracle")
    )
    assert best is not None
    assert tasks is not None
    assert items is not None
    assert best - 1e-12 <= tasks <= items + 1e-12
    copied = a if first["", "best single source"].detail == "a" else b
    gap = found(rows, a=a, b=b, fused=fused, copy=copied)["copy", "gap recovered"]
    assert gap.reason.startswith("no gap") if gap.value is None else gap.value == 0
    assert gap.value is None or items > best


@pytest.mark.parametrize(
    ("values", "key", "reason"),
    [
        ({"a": A, "fused": FUSED}, ("", "item oracle"), "no records of b"),
        (
            {"a": A, "b": (run("b", B)[0], run("b", B)[1][:8]), "fused": FUSED},
            ("", "best single source"),
            "b lacks 2 of 10 items",
        ),
        (
            {"a": A, "b": B, "fused": (run("fused", A)[0], run("fused", A)[1][2:])},
            ("fused", "forgotten"),
            "fused lacks 2 of 10 items",
        ),
        (
            {"a": A, "b": run("b", B, protocol="other"), "fused": FUSED},
            ("", "best single source"),
            "b: protocol is other",
        ),
        ({"a": A, "b": A, "fused": FUSED}, ("fused", "gap recovered"), "no gap: a is as good"),
        ({"a": [0] * 10, "b": B, "fused": FUSED}, ("fused", "forgotten"), "that a had right"),
        ({"a": [1] * 10, "b": B, "fused": FUSED}, ("fused", "emergent"), "no source had right"),
        ({"a": A, "b": [np.nan] * 10}, ("", "best single source"), "no item was scored for all"),
        (
            {"a": A, "b": B, "fused": [np.nan, *FUSED[1:]]},
            ("fused", "gap recovered"),
            "not every item was scored",
        ),
    ],
)
def test_what_is_not_there_has_a_reason_and_no_number(
    values: dict[str, Any], key: tuple[str, str], reason: str
) -> None:
    line = found(**values)[key]
    assert reason in line.reason
    assert line.value is line.low is None


def test_no_line_is_of_the_tasks_that_are_left() -> None:
    lost = [*A[:6], *[np.nan] * 4]
    (line,) = [x for x in found(a=lost, b=B, fused=FUSED).values() if x.suite]
    assert line.reason == "not measured: no item was scored for all sources in t2"
    # A sample that left t2 out for all rows is of t1 alone.
    some = {row: run(row, v, partial=True) for row, v in {"a": A, "b": B, "fused": FUSED}.items()}
    got = found(**{row: (one, frame[:6]) for row, (one, frame) in some.items()})
    assert got["", "item oracle"].value == pytest.approx(4 / 6)


def test_a_target_that_is_not_measured(tmp_path: Path) -> None:
    rows = [*ROWS[:2], ROWS[3] | {"target": "unused"}]
    line = found(rows, a=A, b=B, fused=FUSED)["fused", "forgotten"]
    assert "the target unused has no records" in line.reason


def test_one_source_alone_draws_no_line() -> None:
    assert not found([{"name": "a", "kind": "source"}], a=A)
