"""A judge: verdicts kept, read, asked for twice; behind an endpoint that fails in every way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.errors import RecipeError, RunError
from harness import judging
from harness.asking import _talk
from harness.build import build
from harness.judges import endpoint
from harness.judging import (
    judge,
    preference_prompts,
    rating_prompts,
    read_preference,
    read_rating,
    sentence,
)
from harness.measuring import measure_rows
from harness.plan import Plan, plan
from harness.recipe import Judge, parse
from reports.corpus import corpus_score, lc_win_rate, win_counts
from reports.records import Run, read_samples, read_scores

TEXT = """
sources: {llama: {path: "tiny:llama"}, gemma: {path: "tiny:gemma"}}
variants: {pack: {ensemble: {members: [llama, gemma], rule: mean_probability}}}
evaluate: {suites: [tiny_talk]}
reference: llama
"""


class Server(ThreadingHTTPServer):
    """Answers as an OpenAI-compatible API does, or as `script` says, request by request."""

    script: list[Any]
    asked: list[dict[str, Any]]
    reply: Any


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body | {"key": self.headers.get("Authorization")})
        step = self.server.script.pop(0) if self.server.script else None
        status, content = 200, self.server.reply(body["messages"][0]["content"])
        if isinstance(step, int):
            status, content = step, {"error": {"message": f"no ({body['model']}, s3cret)"}}
        elif step is not None:
            content = step
        else:
            message = {"role": "assistant", "content": content}
            content = {
                "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
            }  # fmt: skip
        raw = json.dumps(content).encode() if not isinstance(content, bytes) else content
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server(("127.0.0.1", 0), _Handler)
    found.script, found.asked, found.reply = [], [], lambda prompt: "Fine.\nRating: 7"
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's pauses between tries, not the tries."""
    openai = pytest.importorskip("openai")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.02)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def planned(home: Path, *overrides: str) -> Plan:
    recipe = parse(TEXT, "r", overrides)
    build(plan(recipe, home), recipe.rows)
    return plan(recipe, home)


def measured(home: Path, row: str, *overrides: str) -> tuple[dict[str, str], Run]:
    made = planned(home, *overrides)
    (step,) = made.evaluations(row)
    reasons = measure_rows(made, {row: [step]}) if not step.done else {}
    return reasons, Run.open(step.folder)


def test_without_a_judge_answers_are_kept_and_nothing_is_scored(home: Path) -> None:
    reasons, run = measured(home, "llama")
    assert reasons == {}
    frame = read_scores(run)
    assert frame.value.isna().all()
    assert set(frame.outcome) == {"no_judge"}
    assert sorted(p.name for p in run.folder.glob("samples-*")) == ["samples-00000.parquet"]


def test_a_judge_given_later_only_judges(home: Path, server: Server) -> None:
    measured(home, "llama")
    where = f"evaluate.judge={{endpoint: '{url(server)}', model: j, again: 1.0}}"
    before = {p: p.stat().st_mtime_ns for p in (home / "evaluations").rglob("samples-*")}
    reasons, run = measured(home, "llama", where)
    assert reasons == {}
    assert {p: p.stat().st_mtime_ns for p in before} == before
    frame = read_scores(run).set_index(["doc_id", "metric"]).value
    assert frame[(0, "rating")] == frame[(0, "rating_turn_2")] == 0.7
    assert run.manifest["judge"]["verdicts"] == len(server.asked) == 8
    assert (run.manifest["judge"]["again"], run.manifest["judge"]["alike"]) == (4, 1.0)
    assert any("judged by j: 8 verdicts" in note for note in run.manifest["notes"])
    count = len(server.asked)
    made = planned(home, where)
    (step,) = made.evaluations("llama")
    assert step.done
    (step.folder / "manifest.json").unlink()
    assert measured(home, "llama", where)[0] == {}
    assert len(server.asked) == count  # every verdict was known
    other = f"evaluate.judge={{endpoint: '{url(server)}', model: other}}"
    protocol = run.manifest["tasks"][0]["protocol"]
    assert measured(home, "llama", other)[1].manifest["tasks"][0]["protocol"] != protocol


def test_a_second_turn_stands_after_the_models_own_first_answer(home: Path, server: Server) -> None:
    where = f"evaluate.judge={{endpoint: '{url(server)}', model: turns}}"
    measured(home, "gemma", where)
    text = "\n".join(body["messages"][0]["content"] for body in server.asked)
    assert "Say it again in one word." in text
    assert "[A right answer to the last question]\n10" in text

    class Echo:
        def generate(self, requests: list[Any]) -> list[Any]:
            self.seen = [json.loads(r.args[0][1:]) for r in requests]
            return [type("G", (), {"text": f"said {len(self.seen[0])}"})() for _ in requests]

    from harness.measuring import Measuring

    made = planned(home)
    items = Measuring(made).suite(made.evaluations("llama")[0]).items
    lm = Echo()
    found = dict((item.doc_id, [a.text for a in said]) for item, said in _talk(lm, items))
    assert found == {0: ["said 1", "said 3"], 1: ["said 1", "said 3"]}
    assert lm.seen[0][1] == ["assistant", "said 1"]


def test_an_ensemble_answers_each_turn_after_its_own_answers(home: Path) -> None:
    reasons, run = measured(home, "pack")
    assert reasons == {}
    said = read_samples(run).generation
    assert [len(turns) for turns in said] == [2, 2]
    assert set(read_scores(run).outcome) == {"no_judge"}


def test_a_row_may_be_the_judge_and_what_it_says_is_mostly_no_verdict(home: Path) -> None:
    reasons, run = measured(home, "llama", "evaluate.judge={model: gemma, max_tokens: 4}")
    assert reasons == {}
    assert run.manifest["judge"]["unparsed"] == 2
    assert read_scores(run).value.isna().all()


def test_failures_are_tried_again_and_then_told_without_the_key(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "s3cret")
    section = Judge(model="j", endpoint=url(server), key_env="THE_KEY")
    server.script = [429, 500, 503]
    assert endpoint(section)("x", 0) == ("Fine.\nRating: 7", 7)
    assert server.asked[-1]["key"] == "Bearer s3cret"
    for script, said in (
        ([500] * 9, "InternalServerError"),
        ([401], "AuthenticationError"),
        ([{"choices": []}], "no message"),
        ([b"<html>"] * 9, "no message"),
    ):
        server.script = list(script)
        with pytest.raises(RunError, match=said) as caught:
            endpoint(section)("x", 0)
        assert "s3cret" not in str(caught.value)
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(RunError, match="THE_KEY is not set"):
        endpoint(section)


def test_what_was_said_before_a_failure_is_kept(tmp_path: Path) -> None:
    docs = [(("t", n), {"turns": [f"Q{n}"]}, [f"A{n}"]) for n in range(6)]
    asked: list[str] = []

    def ask(prompt: str, number: int) -> tuple[str, int]:
        if len(asked) == 3:
            raise RunError("the endpoint is gone")
        asked.append(prompt)
        return "Rating: 4", 1

    section = Judge(model="j", again=0.0)
    with pytest.raises(RunError, match="gone"):
        judge("rating", section, "k" * 16, docs, ask, tmp_path)
    files = sorted((tmp_path / "judgements").rglob("*.json"))
    assert len(files) == 3
    files[0].write_text(files[0].read_text()[:9])  # cut short
    asked.clear()
    counted: list[str] = []

    def again(prompt: str, number: int) -> tuple[str, int]:
        counted.append(prompt)
        return "Rating: 4", 1

    found = judge("rating", section, "k" * 16, docs, again, tmp_path)
    assert len(counted) == 4
    assert {row["value"] for rows in found.rows.values() for row in rows} == {0.4}


def test_a_request_that_hangs_holds_up_neither_an_error_nor_the_end(tmp_path: Path) -> None:
    docs = [(("t", n), {"turns": [f"Q{n}"]}, [f"A{n}"]) for n in range(2)]
    hanging, answer = threading.Event(), threading.Event()

    def ask(prompt: str, number: int) -> tuple[str, int]:
        if "Q0" in prompt:
            hanging.set()
            answer.wait(20)
        hanging.wait(20)
        raise RunError("the endpoint is gone")

    section = Judge(model="j", endpoint="http://localhost/v1", again=0.0, at_once=2)
    others = set(threading.enumerate())
    started = time.monotonic()
    with pytest.raises(RunError, match="gone"):
        judge("rating", section, "k" * 16, docs, ask, tmp_path)
    assert time.monotonic() - started < 10
    assert all(t.daemon for t in set(threading.enumerate()) - others)  # Python waits for the rest
    answer.set()


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Good.\nRating: 8", 8.0),
        ("Rating: [[9]]", 9.0),
        ("**Rating:** 6.5", 6.5),
        ("Rating: 3 at first. Rating: 5", 5.0),
        ("Rating: 11", None),
        ("Rating: 0", None),
        ("It deserves an 8", None),
        ("", None),
    ],
)
def test_grades_are_read_or_there_is_none(text: str, grade: float | None) -> None:
    assert read_rating(text) == grade


def test_preferences_turn_with_the_order() -> None:
    assert read_preference("Better: A", first=True) == 1
    assert read_preference("better: **B**", first=True) == 0
    assert read_preference("Better: B", first=False) == 1
    assert read_preference("Better: none", first=False) == 0.5
    assert read_preference("A is better", first=True) is None
    first, second = preference_prompts({"turns": ["R"], "reference": ["other"]}, "mine")
    assert first.index("mine") < first.index("other")
    assert second.index("other") < second.index("mine")
    assert len(list(rating_prompts({"turns": ["a", "b"], "reference": []}, ["1", "2"]))) == 2


def test_an_order_that_turns_the_verdict_prefers_nobody(tmp_path: Path) -> None:
    docs = [(("t", n), {"turns": ["Q"], "reference": ["x" * n]}, ["y" * 5]) for n in (1, 9)]
    section = Judge(model="j", again=0.0)
    found = judge("preference", section, "a" * 16, docs, lambda p, n: ("Better: A", 1), tmp_path)
    wins = [r for rows in found.rows.values() for r in rows if r["metric"] == "win_rate"]
    assert [(w["value"], w["outcome"]) for w in wins] == [(0.5, "order"), (0.5, "order")]
    assert found.facts["order"] == 2
    assert found.facts["win_rate"] == 0.5
    assert "2 items turned by the order" in sentence(found.facts)
    assert "win rate" not in sentence(found.facts)  # a column of its own has it
    counts = np.array([r["counts"] for rows in found.rows.values() for r in rows if r["counts"]])
    assert corpus_score(counts.astype(float), "lc_win_rate") == pytest.approx(0.5)


def simulated(theta: float, phi: float, n: int = 4000, seed: int = 0) -> Any:
    g = np.random.default_rng(seed)
    longer = g.normal(200, 400, n)
    p = 1 / (1 + np.exp(-(theta + phi * np.tanh(longer / longer.std()))))
    return [win_counts(float(g.random() < q), d)[0] for q, d in zip(p, longer, strict=True)]


def rate(counts: Any) -> float:
    return float(lc_win_rate(np.array(counts, dtype=float).sum(0)[None])[0])


def test_a_length_controlled_win_rate_is_what_equal_lengths_would_give() -> None:
    for theta, phi in ((-1.0, 0.0), (0.5, 1.5), (-0.3, 3.0)):
        expected = 1 / (1 + np.exp(-theta))
        assert rate(simulated(theta, phi)) == pytest.approx(expected, abs=0.03)


def test_laws_of_the_length_controlled_win_rate() -> None:
    flat = [win_counts(p, 0.0)[0] for p in (1, 1, 0, 0.5)]
    assert rate(flat) == pytest.approx(0.625, abs=1e-6)  # the win rate where lengths are equal
    g = np.random.default_rng(1)
    pairs = [(float(g.random() < 0.4), float(d)) for d in g.normal(150, 300, 500)]
    one = rate([win_counts(p, d)[0] for p, d in pairs])
    other = rate([win_counts(1 - p, -d)[0] for p, d in pairs])
    assert one + other == pytest.approx(1, abs=1e-6)
    assert rate([win_counts(0.5, 0.0)[0]] * 9) == pytest.approx(0.5)
    assert rate([win_counts(1.0, d)[0] for d in (-500, 10, 800)]) > 0.99


def test_against_a_fit_by_statsmodels() -> None:
    import statsmodels.api as sm

    counts = np.array(simulated(0.4, 1.0, 1500, 3), dtype=float)
    bins = counts.shape[1] // 2
    from reports.corpus import LENGTHS

    longer = LENGTHS[counts[:, :bins].argmax(1)]
    won = counts[:, bins:].sum(1) / 2
    design = sm.add_constant(np.tanh(longer / longer.std()))
    fit = sm.GLM(won, design, family=sm.families.Binomial()).fit()
    assert rate(counts) == pytest.approx(1 / (1 + np.exp(-fit.params[0])), abs=1e-6)


def test_a_judge_is_a_source_or_has_an_endpoint() -> None:
    with pytest.raises(RecipeError, match=r"'gemmma' is no source .*gemma\?"):
        parse(TEXT, "r", ["evaluate.judge={model: gemmma}"])
    with pytest.raises(RecipeError, match="evaluate.judge.endpoint"):
        parse(TEXT, "r", ["evaluate.judge={model: j, endpoint: nowhere}"])
    assert judging.judge_key(planned_key()) is None
    one, more, other = (
        judging.judge_key(planned_key(f"evaluate.judge={{endpoint: 'http://x/v1', model: {said}}}"))
        for said in ("j", "j, again: 0.5, at_once: 2", "k")
    )
    assert one == more != other


def planned_key(*overrides: str) -> Plan:
    return Plan(parse(TEXT, "r", overrides), Path())
