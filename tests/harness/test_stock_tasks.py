"""Chat suites of lm-eval's own tasks: equal to its own loop with a chat template, whole or refused.

The questions are made up here; lm-eval's task files, filters and checks are its own.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

from fusion.conversations import said_in
from fusion.errors import RunError
from fusion.vocabulary import build
from harness import stock_tasks
from harness.asking import ask, read_as, record
from harness.ensembles import EnsembleLM
from harness.evaluate import Loaded, load
from harness.run import run
from harness.scores import _scores
from harness.scoring import SharedPrefixLM, stock
from harness.speaking import Speaking
from harness.stock_tasks import lacking, lay_out
from tasks.open_questions import gsm8k, ifeval
from tasks.suite import load_suite

TOKENS = 16  # of an answer; the tiny models have no room for more


def sums(count: int) -> list[dict[str, Any]]:
    """Small problems in the hub's columns."""
    rows = [
        {"question": f"A cook has {n} eggs and buys 2.", "answer": f"Add.\n#### {n + 2}"}
        for n in range(count)
    ]
    return list(gsm8k(rows))


def orders() -> list[dict[str, Any]]:
    """Instructions whose checks need no sentences, in the hub's columns."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"relation": "less than", "num_words": 40}),
        ("keywords:existence", {"keywords": ["the"]}),
    ]
    rows = []
    for number in range(4):
        some = kinds[: 1 + number % 3]
        row: dict[str, Any] = {"key": 100 + number, "prompt": f"Tell of day {number}."}
        row["instruction_id_list"] = [kind for kind, _ in some]
        rows.append(row | {"kwargs": [{"num_words": None} | given for _, given in some]})
    return list(ifeval(rows))


def folder(path: Path, name: str) -> Path:
    """A suite's questions and its task file, with short answers."""
    path.mkdir(exist_ok=True)
    sets = {"gsm8k": sums(6), "gsm8k_train": sums(9), "ifeval": orders()}
    for dataset in load_suite(name).datasets:
        lines = [json.dumps(document) for document in sets[dataset]]
        (path / f"{dataset}.jsonl").write_text("\n".join(lines) + "\n")
    lay_out(load_suite(name), path)
    file = path / f"{name}.yaml"
    short = {"until": ["Question:"], "do_sample": False, "max_gen_toks": TOKENS}
    file.write_text(file.read_text() + yaml.safe_dump({"generation_kwargs": short}))
    return path


@pytest.fixture
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What IFEval's checks need; NLTK's part is looked for, but not read by these checks."""
    for name in load_suite("ifeval").needs:
        pytest.importorskip(name)
    import nltk

    (tmp_path / "nltk/tokenizers/punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk"), *nltk.data.path])


def answered(loaded: Loaded, lm: Any) -> dict[int, tuple[str, dict[str, float]]]:
    """Our texts and metrics by question."""
    found = {}
    for item, answers in ask(lm, loaded.items):
        item.requests[0].resps = [answer.text for answer in answers]
        found[item.doc_id] = (item, answers)
    for task in loaded.tasks.values():
        task.apply_filters()
    out = {}
    for number, (item, answers) in found.items():
        rows = list(_scores(loaded, item, record(item, answers), None))
        out[number] = (answers[0].text, {row["metric"]: row["value"] for row in rows})
    return out


@pytest.mark.parametrize("name", ["gsm8k", "ifeval"])
@pytest.mark.parametrize("model", ["llama", "gemma", "neox"])
def test_texts_and_scores_are_those_of_lm_evals_own_loop(
    name: str, model: str, tiny: dict[str, Path], tmp_path: Path, request: Any
) -> None:
    if name == "ifeval":
        request.getfixturevalue("checks")
    data = folder(tmp_path / "data", name)
    loaded = load(name, data, None, 17, load_suite(name))
    ours = answered(loaded, SharedPrefixLM(str(tiny[model]), device="cpu"))
    chat = model != "neox"  # which has no template
    lm = stock(str(tiny[model]), "cpu")
    if model == "llama":  # lm-eval would begin with a BOS if this tokenizer had one
        assert lm.tokenizer.bos_token is None  # type: ignore[attr-defined]
    theirs: Any = lm_eval.simple_evaluate(
        lm,
        tasks=[name],
        task_manager=TaskManager(
            include_path=str(data), include_defaults=False, metadata={"data_dir": str(data)}
        ),
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        log_samples=True,
    )
    (task,) = loaded.suite.tasks
    samples = [s for s in theirs["samples"][name] if task.filter in ("none", s["filter"])]
    assert len(samples) == len(ours) >= 4
    for sample in samples:
        text, metrics = ours[sample["doc_id"]]
        assert text == sample["resps"][0][0]
        asked = sample["arguments"][0][0]
        own = SimpleNamespace(tokenizer=lm.tokenizer)  # type: ignore[attr-defined]
        prompt = str(loaded.items[sample["doc_id"]].requests[0].args[0])
        assert SharedPrefixLM.reads(own, prompt) == (asked, chat)  # type: ignore[arg-type]
        assert metrics[task.metric] == float(sample[task.metric])
        for metric, value in metrics.items():
            said = sample[metric]
            assert value == (sum(said) / len(said) if isinstance(said, list) else float(said))


def test_solved_examples_are_turns_and_the_plain_prompt_holds_the_same(tmp_path: Path) -> None:
    loaded = load("gsm8k", folder(tmp_path / "data", "gsm8k"), None, 17, load_suite("gsm8k"))
    for item in loaded.items:
        turns, plain = said_in(item.prompt)
        assert [role for role, _ in turns] == ["user", "assistant"] * 5 + ["user"]
        assert plain is not None
        assert plain.count("Question:") == 6
        assert [plain.find(said.strip()) >= 0 for _, said in turns] == [True] * 11
        assert item.doc["gold"] == str(item.doc_id + 2)


def test_a_row_says_whether_it_was_asked_by_its_template(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load("gsm8k", folder(tmp_path / "data", "gsm8k"), 2, 17, load_suite("gsm8k"))
    models = {n: SharedPrefixLM(str(tiny[n]), device="cpu") for n in ("llama", "neox")}
    assert read_as(models["llama"], loaded.items) == ({"asked": "chat"}, [])
    how, told = read_as(models["neox"], loaded.items)
    assert how == {"asked": "plain"}
    assert "no chat template" in told[0]
    mixed: Any = SimpleNamespace(members=list(models.values()))
    assert "number 2 has no chat template" in read_as(mixed, loaded.items)[1][0]


@pytest.mark.parametrize(
    "rule", ["mean_probability", "packllm_sim", "top1", "majority_vote", "byte_exact"]
)
def test_a_pair_answers_conversations_as_it_goes_on_from_what_its_template_writes(
    rule: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load("gsm8k", folder(tmp_path / "data", "gsm8k"), 3, 17, load_suite("gsm8k"))
    lm = SharedPrefixLM(str(tiny["gemma"]), device="cpu")
    same = build(lm.tokenizer, lm.tokenizer)
    pair = EnsembleLM([lm, lm], rule, {}, [same])
    talks = [item.requests[0] for item in loaded.items]
    written = [replace(r, arguments=(lm.reads(r.args[0])[0], r.args[1])) for r in talks]
    assert pair.generate(talks) == pair.generate(written)


def test_members_read_their_own_templates(tiny: dict[str, Path], tmp_path: Path) -> None:
    loaded = load("gsm8k", folder(tmp_path / "data", "gsm8k"), 2, 17, load_suite("gsm8k"))
    models = [SharedPrefixLM(str(tiny[name]), device="cpu") for name in ("llama", "gemma", "neox")]
    maps = [build(m.tokenizer, models[0].tokenizer) for m in models[1:]]
    pack = EnsembleLM(models, "packllm_sim", {}, maps)
    requests = [item.requests[0] for item in loaded.items]
    said = pack.generate(requests)
    assert [bool(one.tokens) for one in said] == [True, True]
    with torch.inference_mode():
        batch = Speaking(pack, [r.args[0] for r in requests], models[0]._prepared(requests))
        batch.run()
    starts = [text[0][0][:14] for text in batch.prompts]
    assert starts == ["user:\nQuestion", "<s>[user]\nQues", "Question: A co"]

    for number, member in enumerate(models[1:], 1):  # what was said stands behind each prompt
        for row in range(2):
            prompt = member.tok_encode(requests[row].args[0])
            assert batch.read[number][row][: len(prompt) - 1] == prompt[:-1]
    weights = pack.heard([r.args[0] for r in requests])
    plain = [said_in(r.args[0])[0] for r in requests]
    again = pack.heard(["\n\n".join(text for _, text in turns) for turns in plain])
    assert [w.tolist() for w in weights] == [w.tolist() for w in again]


def test_given_answers_are_not_scored_by_an_ensemble(tiny: dict[str, Path]) -> None:
    item: Any = SimpleNamespace(
        requests=[SimpleNamespace(request_type="loglikelihood", args=("\ue002[]", "a"), repeats=1)],
        doc={},
    )
    with pytest.raises(RunError, match="scores no given answers"):
        list(ask(SimpleNamespace(chats=EnsembleLM.chats), [item]))
    with pytest.raises(RunError, match="kfuse's own backend"):
        list(ask(SimpleNamespace(), [item]))


def test_what_the_checks_need_is_told_before_anything_is_built(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stock_tasks.importlib.util.find_spec
    gone = {"langdetect", "immutabledict"}
    monkeypatch.setattr(
        stock_tasks.importlib.util, "find_spec", lambda n: None if n in gone else found(n)
    )
    assert lacking(load_suite("gsm8k")) == ""
    told = "suite ifeval: its checks need langdetect, immutabledict: pip install -e '.\\[ifeval\\]'"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "sources: {llama: {path: 'tiny:llama'}}\n"
        "corpus: {path: 'tiny:corpus', blocks: 64, tokens: 512}\n"
        "variants: {clm: {train: {init: llama}}}\n"
        "evaluate: {suites: [ifeval]}\nreference: llama\n"
    )
    with pytest.raises(RunError, match=told):
        run(str(recipe))
    assert not list(home.glob("models/clm*"))


def test_without_nltks_part_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in load_suite("ifeval").needs:
        pytest.importorskip(name)
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    assert "nltk.downloader punkt_tab" in lacking(load_suite("ifeval"))


def test_what_is_ours_of_a_stock_task_is_part_of_its_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tasks
    from harness.hashing import definition_hash

    room = Path(tasks.__file__).parent
    shutil.copytree(room, tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(tasks, "__file__", str(tmp_path / "tasks" / "__init__.py"))
    before = definition_hash.__wrapped__("gsm8k")
    for name in ("_stock.yaml", "splits.py", "data.py"):
        path = tmp_path / "tasks" / "definitions" / name
        path.write_text(path.read_text() + "# changed")
        after = definition_hash.__wrapped__("gsm8k")
        assert after != before, name
        before = after
