"""Tables of scores that others printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from reports.compare import NotComparable
from reports.leaderboard import boards, find_runs
from reports.published_scores import read_scores

HEAD = "row,suite,score,source,n,error,lower_is_better\n"


def table(folder: Path, text: str) -> Path:
    path = folder / "scores.csv"
    path.write_text(text)
    return path


def test_each_source_has_columns_of_its_own_and_says_so(tmp_path: Path) -> None:
    printed = '"X 2024, table 1"'
    text = HEAD + f"a,bbh,0.42,{printed},6511,0.006,\nb,bbh,0.40,{printed},6511,,\n"
    path = table(tmp_path, text + "a,bbh,0.39,Y 2025,,,\na,bits_per_byte,0.9,Y 2025,,,\n")
    found = boards(*find_runs([path]))
    assert [(b.suite, len(b.lines)) for b in found] == [
        ("bbh", 2),
        ("bbh", 1),
        ("bits_per_byte", 1),
    ]
    best = found[0].lines[0]
    assert (best.row, best.score, best.n, best.rank_low, best.group) == ("a", 0.42, 6511, None, "")
    assert best.source == "published: X 2024, table 1"
    assert best.low == pytest.approx(0.42 - 1.96 * 0.006, abs=1e-5)
    assert found[0].lines[1].low is None
    assert not found[2].higher_is_better
    assert "no items" in found[0].note


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column row"),
        ("row,suite,score\na,b,0.5\n", "no column source"),
        ("row,suite,score,source,colour\n", "unknown column 'colour'"),
        (HEAD, "nothing to import"),
        (HEAD + "a,bbh,45.2,X,,,\n", "line 2: score is 45.2; a fraction"),
        (HEAD + "a,bbh,x,X,,,\n", "line 2: score is 'x'"),
        (HEAD + "a,bbh,nan,X,,,\n", "not a number"),
        (HEAD + "a,bbh,0.5,,,,\n", "no source"),
        (HEAD + "a,bbh,0.5,X,,,,,\n", "more cells"),
        (HEAD + "a,bbh,0.5,X,,,\na,bbh,0.6,X,,,\n", "stands there twice"),
        (HEAD + "a,bbh,0.5,X,,,maybe\n", "yes or no"),
        (HEAD + "a,bbh,0.5,X,0,,\n", "n is 0"),
        (HEAD + "a,bbh,0.5,X,1.5,,\n", "n is 1.5"),
        (HEAD + "a,bbh,0.5,X,,-0.1,\n", "error is -0.1"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scores\.csv") as caught:
        read_scores(table(tmp_path, text))
    assert message in str(caught.value)
    with pytest.raises(NotComparable):
        find_runs([tmp_path / "scores.csv"])


def test_bits_are_bits_whatever_the_protocol_and_directions_stand_apart(tmp_path: Path) -> None:
    text = HEAD + "a,bits_per_byte@x,0.98,X,,,\nb,bits_per_byte@x,0.72,X,,,\n"
    (found,) = boards(*find_runs([table(tmp_path, text)]))
    assert (found.unit, [line.row for line in found.lines]) == ("", ["b", "a"])
    text = HEAD + "a,loss,0.9,X,,,yes\nb,loss,0.7,X,,,no\n"
    assert len(boards(*find_runs([table(tmp_path, text)]))) == 2


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_bytes(b"row,suite\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a CSV table"):
        read_scores(path)
