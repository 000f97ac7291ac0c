"""What papers printed, typed by hand, to stand beside what is measured.

As printed: percent, or grades out of ten. Columns are models: public ones under their hub id, the
rows that a paper trained or merged under the names that our recipes give them. Nothing is computed
here but fractions; a test holds the printed averages against the columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isfinite

from tasks.bbh81 import NAMES
from tasks.published_chat import (
    CATEGORIES,
    V1,
    V1_SOURCES,
    V2,
    V2_SOURCES,
    V3,
    V3_COLUMNS,
)

OPEN_LLAMA = "openlm-research/open_llama_7b_v2"
MPT = "mosaicml/mpt-7b"
LLAMA2 = "meta-llama/Llama-2-7b-hf"
LLAMA2_13B = "meta-llama/Llama-2-13b-hf"
MODELS = (OPEN_LLAMA, MPT, LLAMA2, "clm", "fusellm")
DISTILLED = (LLAMA2_13B, "kd")  # what FuseLLM's table 6 has beyond the others


@dataclass(frozen=True, slots=True)
class Published:
    """One table of a paper: values by task and average by name, in the order of `models`.

    items: how many questions the paper's tasks have. unlike: why a number of ours is no
    measurement of the same thing; empty if it is. An average is the unweighted mean over all tasks
    but those in `without`; a table that prints no tasks means all of the suite's. metrics: what is
    printed of the whole suite by another metric than its own, by the title that reports give it.
    sources: hub ids that a recipe has, if its trained and merged rows are the paper's; those begin
    as the first. full: the printed value of a perfect score. NaN: not printed.
    """

    paper: str
    table: str
    tasks: dict[str, tuple[float, ...]]
    averages: dict[str, tuple[float, ...]]
    items: dict[str, int]
    decimals: int = 2
    without: tuple[str, ...] = ()  # tasks that the second average leaves out
    unlike: str = ""
    models: tuple[str, ...] = MODELS
    metrics: dict[str, tuple[float, ...]] = field(default_factory=dict)
    sources: tuple[str, ...] = (LLAMA2,)
    full: float = 100.0

    def of(self, model: str) -> dict[str, float]:
        """A model's values by task, average and metric, fractions; empty if it is not listed."""
        if model not in self.models:
            return {}
        column = self.models.index(model)
        listed = self.tasks | self.averages | self.metrics
        found = {name: values[column] / self.full for name, values in listed.items()}
        return {name: value for name, value in found.items() if isfinite(value)}


_PAPER = "FuseLLM 2401.10491"

_BBH = Published(
    _PAPER,
    "table 1",
    {
        "kfuse_bbh_fusellm_boolean_expressions": (74.40, 66.00, 68.80, 76.00, 71.60),
        "kfuse_bbh_fusellm_causal_judgement": (45.45, 50.80, 50.80, 46.52, 46.52),
        "kfuse_bbh_fusellm_date_understanding": (43.60, 43.60, 59.60, 59.20, 62.40),
        "kfuse_bbh_fusellm_disambiguation_qa": (36.00, 47.60, 46.80, 48.00, 50.00),
        "kfuse_bbh_fusellm_dyck_languages": (5.20, 5.20, 7.20, 6.40, 8.80),
        "kfuse_bbh_fusellm_formal_fallacies": (50.80, 52.80, 49.20, 48.80, 49.20),
        "kfuse_bbh_fusellm_geometric_shapes": (0.00, 0.00, 34.40, 19.20, 22.80),
        "kfuse_bbh_fusellm_hyperbaton": (62.80, 53.60, 54.40, 56.40, 65.20),
        "kfuse_bbh_fusellm_logical_deduction_three_objects": (43.60, 40.80, 54.00, 57.20, 60.40),
        "kfuse_bbh_fusellm_logical_deduction_five_objects": (24.80, 31.60, 31.20, 35.60, 33.20),
        "kfuse_bbh_fusellm_logical_deduction_seven_objects": (16.80, 18.40, 24.80, 29.60, 25.60),
        "kfuse_bbh_fusellm_movie_recommendation": (39.60, 52.00, 72.80, 71.60, 73.60),
        "kfuse_bbh_fusellm_multistep_arithmetic_two": (0.80, 0.40, 0.80, 4.40, 4.80),
        "kfuse_bbh_fusellm_navigate": (54.00, 48.80, 56.00, 61.20, 64.40),
        "kfuse_bbh_fusellm_object_counting": (49.60, 40.40, 49.60, 51.60, 55.20),
        "kfuse_bbh_fusellm_penguins_in_a_table": (28.08, 28.08, 32.19, 31.51, 32.88),
        "kfuse_bbh_fusellm_reasoning_about_colored_objects": (28.00, 31.60, 46.40, 47.20, 48.40),
        "kfuse_bbh_fusellm_ruin_names": (31.20, 23.20, 34.00, 30.80, 32.40),
        "kfuse_bbh_fusellm_salient_translation_error_detection": (14.80, 0.00, 24.80, 27.60, 29.20),
        "kfuse_bbh_fusellm_snarks": (44.94, 45.51, 47.75, 49.44, 49.44),
        "kfuse_bbh_fusellm_sports_understanding": (64.40, 82.40, 90.00, 90.00, 91.20),
        "kfuse_bbh_fusellm_temporal_sequences": (32.00, 21.20, 12.80, 16.40, 16.40),
        "kfuse_bbh_fusellm_tracking_shuffled_objects_three_objects": (
            36.40,
            30.40,
            33.20,
            33.20,
            34.40,
        ),
        "kfuse_bbh_fusellm_tracking_shuffled_objects_five_objects": (
            19.20,
            14.40,
            15.60,
            15.20,
            15.60,
        ),
        "kfuse_bbh_fusellm_tracking_shuffled_objects_seven_objects": (
            10.80,
            2.00,
            11.20,
            9.60,
            10.40,
        ),
        "kfuse_bbh_fusellm_web_of_lies": (51.60, 63.60, 50.80, 61.60, 65.60),
        "kfuse_bbh_fusellm_word_sorting": (5.60, 6.80, 12.80, 7.60, 7.60),
    },
    averages={"average": (33.87, 33.38, 39.70, 40.44, 41.75)},
    items={
        f"kfuse_bbh_fusellm_{name}": {
            "causal_judgement": 187,
            "penguins_in_a_table": 146,
            "snarks": 178,
        }.get(name, 250)
        for name in NAMES
    },
)

_COMMONSENSE = Published(
    _PAPER,
    "table 2",
    {
        "kfuse_arc_easy": (69.70, 70.12, 74.58, 74.54, 75.04),
        "kfuse_arc_challenge": (41.38, 42.15, 46.33, 46.50, 47.44),
        "kfuse_boolq": (72.29, 74.74, 77.71, 76.88, 78.13),
        "kfuse_hellaswag": (74.53, 76.25, 76.00, 76.57, 76.78),
        "kfuse_openbookqa": (41.00, 42.40, 44.20, 44.80, 45.40),
    },
    averages={"average": (59.78, 61.13, 63.76, 63.86, 64.56)},
    items={
        "kfuse_arc_easy": 2376,
        "kfuse_arc_challenge": 1172,
        "kfuse_boolq": 3270,
        "kfuse_hellaswag": 10042,
        "kfuse_openbookqa": 500,
    },
)

# Go was judged by a runner that took "no test files" for a pass; the second average, which the
# paper does not print, leaves it out.
_MULTIPL_E = Published(
    _PAPER,
    "table 3",
    {
        "kfuse_multipl_e_cpp": (14.47, 13.11, 7.45, 9.88, 9.25),
        "kfuse_multipl_e_go": (68.20, 66.96, 57.02, 54.44, 59.78),
        "kfuse_multipl_e_java": (14.28, 13.42, 10.31, 10.50, 10.34),
        "kfuse_multipl_e_js": (17.61, 13.01, 13.17, 14.25, 14.32),
        "kfuse_multipl_e_php": (11.24, 9.53, 9.75, 9.04, 9.41),
        "kfuse_multipl_e_py": (15.96, 17.24, 13.85, 13.07, 13.91),
        "kfuse_multipl_e_r": (7.52, 4.53, 4.97, 5.25, 5.84),
        "kfuse_multipl_e_rb": (10.34, 12.33, 10.37, 10.68, 11.24),
        "kfuse_multipl_e_rs": (6.18, 8.29, 6.77, 6.96, 7.05),
        "kfuse_multipl_e_ts": (15.31, 14.13, 12.61, 14.19, 14.50),
    },
    averages={
        "average": (18.11, 17.26, 14.63, 14.83, 15.56),
        "average without Go": (12.55, 11.73, 9.92, 10.42, 10.65),
    },
    items={},
    without=("kfuse_multipl_e_go",),
    unlike="how many samples were drawn, and at which temperature, is not known",
)

_GENERATION = Published(
    _PAPER,
    "table 8",
    {
        "kfuse_triviaqa": (39.96, 28.89, 52.46, 53.14, 54.49),
        "kfuse_drop": (22.31, 23.54, 27.25, 28.51, 28.97),
        "kfuse_lambada": (70.31, 70.08, 73.28, 73.45, 73.72),
        "kfuse_iwslt2017": (5.51, 5.49, 6.48, 6.91, 6.75),
        "kfuse_scibench": (0.68, 0.88, 0.14, 0.94, 1.65),
    },
    averages={},
    items={},
    unlike="the published prompts, shots, subsets and metrics are not known",
)


def _distilled(*values: float) -> Published:
    """A suite's column of FuseLLM's table 6: a larger model, and what was distilled from it."""
    average = {"average": values}
    return Published(_PAPER, "table 6", {}, average, {}, models=DISTILLED)


def _column(rows: dict[str, tuple[float, ...]], number: int) -> tuple[float, ...]:
    return tuple(values[number] for values in rows.values())


_JUDGE = "another judge, asked in other words: {}"
_QUESTIONS = {f"kfuse_mt_bench_{name}": 10 for name in CATEGORIES}

_MT_BENCH_1 = Published(
    "FuseChat 2402.16107",
    "MT-Bench by category",
    {name: _column(V1, number) for number, name in enumerate(_QUESTIONS)},
    {"average": _column(V1, 8)},
    _QUESTIONS,
    decimals=1,
    unlike=_JUDGE.format("GPT-4 with the first references"),
    models=tuple(V1),
    sources=V1_SOURCES,
    full=10.0,
)
_MT_BENCH_2 = Published(
    "FuseChat 2408.07990",
    "MT-Bench by turn",
    {},
    {"average": _column(V2, 4)},
    _QUESTIONS,
    decimals=1,
    unlike=_JUDGE.format("GPT-4-0125-preview with corrected references"),
    models=tuple(V2),
    metrics={"first turn": _column(V2, 2), "second turn": _column(V2, 3)},
    sources=V2_SOURCES,
    full=10.0,
)
_ALPACA_EVAL_2 = Published(
    "FuseChat 2408.07990",
    "AlpacaEval 2",
    {"kfuse_alpaca_eval": _column(V2, 1)},
    {},
    {"kfuse_alpaca_eval": 805},
    unlike=_JUDGE.format("alpaca_eval_gpt4_turbo_fn"),
    models=tuple(V2),
    metrics={"win rate": _column(V2, 0)},
    sources=V2_SOURCES,
)


def _version_3(tasks: dict[str, str], items: dict[str, int], unlike: str) -> Published:
    """Columns of FuseChat-3.0's table by our tasks; its models are all public."""
    values = {task: _column(V3, V3_COLUMNS.index(name)) for task, name in tasks.items()}
    return Published(
        "FuseChat-3.0 2412.03187", "main table", values, {}, items, 1, (), unlike, tuple(V3)
    )


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "bbh@fusellm": (_BBH, _distilled(47.92, 40.88)),
    "commonsense@fusellm": (_COMMONSENSE, _distilled(66.33, 64.41)),
    "multipl_e@fusellm": (
        _MULTIPL_E,
        replace(_distilled(18.76, 15.45), unlike=_MULTIPL_E.unlike),
    ),
    "generation@fusellm": (_GENERATION,),
    "mt_bench": (_MT_BENCH_1, _MT_BENCH_2),
    "alpaca_eval": (
        _ALPACA_EVAL_2,
        _version_3(
            {"kfuse_alpaca_eval": "alpaca_eval"},
            {"kfuse_alpaca_eval": 805},
            _JUDGE.format("the paper's"),
        ),
    ),
    "gsm8k": (
        _version_3({"gsm8k": "gsm8k"}, {"gsm8k": 1319}, "the published prompt is not known"),
    ),
    "code": (
        _version_3(
            {"kfuse_humaneval": "humaneval", "kfuse_mbpp": "mbpp"},
            {"kfuse_humaneval": 164},
            "asked as chat, and judged by the tests of EvalPlus",
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Domains:
    """A table of rows by domain that holds no scores: printed numbers, in the order of columns."""

    source: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]
    unlike: str


# Called perplexity; below 1 it can only be bits or nats a byte.
DOMAINS = Domains(
    f"{_PAPER}, table 7",
    ("Phil", "NIH", "USPTO", "average"),
    {
        "Pythia": (0.9008, 0.6740, 0.6077, 0.7275),
        "Phil": (0.8397, 0.6861, 0.6228, 0.7162),
        "NIH": (0.9248, 0.6215, 0.6278, 0.7247),
        "USPTO": (0.9296, 0.6872, 0.6017, 0.7395),
        "Ensemble": (0.8960, 0.6647, 0.6180, 0.7262),
        "Weight Merging": (0.8786, 0.6496, 0.6054, 0.7112),
        "FuseLLM": (0.8463, 0.6569, 0.6068, 0.7034),
    },
    "Pythia-1B on other text, a unit that the paper calls perplexity",
)
