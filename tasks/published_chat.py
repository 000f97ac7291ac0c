"""What the FuseChat papers printed, row by row as in their tables, typed by hand.

Rows are models: public ones under their hub id, those that only an interface serves as printed,
and what the paper trained or merged under the names of the recipes `fusechat_v1` and
`fusechat_v2`. MT-Bench is graded out of ten; everything else is percent. Nothing is computed here.
"""

from __future__ import annotations

OPENCHAT = "openchat/openchat_3.5"
HERMES_MIXTRAL = "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO"
HERMES_SOLAR = "NousResearch/Nous-Hermes-2-SOLAR-10.7B"
STARLING = "berkeley-nest/Starling-LM-7B-alpha"
INTERNLM = "internlm/internlm2-chat-20b"
MIXTRAL = "mistralai/Mixtral-8x7B-Instruct-v0.1"
QWEN = "Qwen/Qwen1.5-72B-Chat"

# The sources of each version; the first is the pivot.
V1_SOURCES = (OPENCHAT, HERMES_MIXTRAL, HERMES_SOLAR)
V2_SOURCES = (OPENCHAT, STARLING, HERMES_SOLAR, INTERNLM, MIXTRAL, QWEN)

# Version 1, MT-Bench by category; the average is the last.
CATEGORIES = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)
V1: dict[str, tuple[float, ...]] = {
    "GPT-4 (March)": (9.65, 8.90, 9.00, 6.80, 8.55, 9.38, 9.70, 9.95, 8.96),
    "GPT-3.5 (March)": (9.20, 8.40, 5.65, 6.30, 6.90, 8.85, 8.70, 9.55, 7.94),
    "Claude-1.0": (9.50, 8.50, 5.95, 4.80, 6.25, 8.80, 9.70, 9.70, 7.90),
    HERMES_MIXTRAL: (9.70, 9.05, 6.65, 6.75, 6.00, 8.80, 9.70, 9.95, 8.33),
    HERMES_SOLAR: (9.50, 8.40, 7.35, 5.55, 4.00, 7.85, 8.80, 9.80, 7.66),
    OPENCHAT: (9.00, 7.85, 7.75, 5.30, 5.50, 8.45, 8.55, 9.90, 7.79),
    "sft": (8.80, 8.60, 7.55, 5.88, 5.45, 8.05, 9.45, 9.85, 7.95),
    "multi": (9.35, 8.38, 8.40, 5.35, 5.15, 8.70, 9.28, 9.90, 8.06),
    "target_mixtral": (9.35, 8.35, 8.50, 5.80, 5.10, 8.25, 9.38, 9.90, 8.08),
    "target_solar": (9.35, 8.43, 8.20, 5.70, 5.70, 8.75, 9.53, 9.80, 8.18),
    "linear": (9.18, 8.23, 8.00, 5.78, 5.55, 8.50, 9.43, 9.78, 8.05),
    "slerp": (9.45, 8.73, 8.05, 6.20, 5.30, 8.45, 9.43, 9.93, 8.19),
    "ta": (9.35, 8.33, 8.15, 5.85, 6.05, 8.45, 9.50, 9.90, 8.20),
    "ties": (9.38, 8.58, 8.15, 5.80, 5.85, 8.40, 9.45, 9.88, 8.18),
    "dare": (9.45, 8.78, 7.75, 5.80, 5.80, 8.45, 9.45, 9.65, 8.14),
    "varm": (9.20, 8.63, 8.00, 6.15, 6.15, 8.50, 9.30, 9.85, 8.22),
}

# Version 2: AlpacaEval 2 (win rate, length-controlled), MT-Bench (first and second turn, average).
V2: dict[str, tuple[float, ...]] = {
    "GPT-3.5-Turbo-1106": (9.18, 19.30, 7.56, 7.41, 7.48),
    "Claude-3-Opus": (29.04, 40.39, 8.84, 8.30, 8.57),
    "GPT-4-1106": (50.00, 50.00, 8.86, 8.71, 8.79),
    OPENCHAT: (10.20, 14.90, 7.14, 6.55, 6.84),
    STARLING: (14.20, 14.70, 7.54, 6.49, 7.01),
    HERMES_SOLAR: (12.22, 18.13, 7.11, 6.36, 6.74),
    INTERNLM: (21.70, 18.70, 7.78, 6.34, 7.06),
    MIXTRAL: (18.30, 23.70, 7.76, 7.00, 7.38),
    QWEN: (26.50, 36.60, 7.83, 7.36, 7.59),
    "ensemble Top1-PPL": (25.11, 27.97, 7.79, 6.95, 7.37),
    "ensemble Top1-LLM-Blender": (24.45, 29.11, 7.85, 6.70, 7.28),
    "ensemble Top1-GPT4": (42.82, 43.87, 8.79, 8.01, 8.40),
    "sft": (10.56, 14.50, 7.36, 6.40, 6.88),
    "multi": (10.19, 13.43, 7.69, 6.26, 6.99),
    "target_starling": (11.43, 16.20, 7.69, 6.73, 7.22),
    "target_solar": (11.12, 16.51, 7.58, 6.76, 7.17),
    "target_internlm": (11.82, 15.21, 7.63, 6.78, 7.21),
    "target_mixtral": (11.74, 16.52, 7.58, 6.90, 7.24),
    "target_qwen": (10.93, 14.98, 7.69, 6.78, 7.23),
    "sce": (11.52, 17.16, 7.70, 7.05, 7.38),
}

# Version 3. The mean of fourteen adds two sets graded out of ten to percentages.
V3_COLUMNS = (
    "alpaca_eval",
    "arena_hard",
    "gsm8k",
    "math",
    "humaneval",
    "mbpp",
    "livecodebench",
    "gpqa_diamond",
    "mmlu_pro",
    "mean of fourteen",
)
_NONE = float("nan")  # not printed
V3: dict[str, tuple[float, ...]] = {
    "meta-llama/Llama-3.1-8B-Instruct": (
        *(28.3, 28.1, 85.9, 50.7, 69.5),
        *(75.4, 12.3, 33.8, 50.0, 40.5),
    ),
    "FuseAI/FuseChat-Llama-3.1-8B-SFT": (
        *(41.3, 38.7, 87.0, 54.7, 69.5),
        *(71.4, 12.6, 37.9, 47.8, 43.2),
    ),
    "FuseAI/FuseChat-Llama-3.1-8B-Instruct": (
        *(65.4, 58.2, 88.0, 55.2, 71.3),
        *(72.0, 13.1, 34.9, 49.2, 47.3),
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        *(33.2, 50.7, 91.7, 75.0, 85.4),
        *(80.2, 15.8, 34.9, 54.1, 50.0),
    ),
    "FuseAI/FuseChat-Qwen-2.5-7B-SFT": (
        *(34.2, 45.2, 92.3, 72.7, 81.7),
        *(84.1, 17.3, 38.4, 51.7, 48.9),
    ),
    "FuseAI/FuseChat-Qwen-2.5-7B-Instruct": (
        *(63.6, 61.4, 91.7, 73.6, 79.9),
        *(83.1, 18.9, 33.8, 53.0, 52.9),
    ),
    "google/gemma-2-9b-it": (
        *(51.1, 40.8, 88.5, 49.6, 67.1),
        *(75.1, 11.9, 39.4, 50.5, 43.9),
    ),
    "FuseAI/FuseChat-Gemma-2-9B-SFT": (
        *(49.8, 44.5, 90.5, 58.0, 65.9),
        *(70.6, 11.0, 33.3, 52.5, 44.7),
    ),
    "FuseAI/FuseChat-Gemma-2-9B-Instruct": (
        *(70.2, 63.4, 91.0, 57.8, 64.0),
        *(71.7, 10.1, 35.4, 52.9, 48.2),
    ),
    "meta-llama/Llama-3.2-3B-Instruct": (
        *(21.4, 16.6, 82.0, 51.4, 61.0),
        *(68.5, 8.3, 29.8, 39.3, 35.2),
    ),
    "FuseAI/FuseChat-Llama-3.2-3B-SFT": (
        *(31.1, 21.3, 82.8, 52.9, 62.8),
        *(67.5, 7.1, 33.3, 40.3, 36.8),
    ),
    "FuseAI/FuseChat-Llama-3.2-3B-Instruct": (
        *(54.0, 30.2, 82.0, 53.1, 60.4),
        *(67.5, 9.0, 33.8, 40.3, 40.2),
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        *(9.7, 5.1, 46.3, 32.7, 39.6),
        *(49.5, _NONE, 21.2, 22.3, 24.0),
    ),
    "FuseAI/FuseChat-Llama-3.2-1B-SFT": (
        *(14.0, 6.0, 55.6, 34.7, 36.6),
        *(42.1, _NONE, 25.3, 21.5, 24.5),
    ),
    "FuseAI/FuseChat-Llama-3.2-1B-Instruct": (
        *(25.3, 8.6, 54.5, 33.6, 40.2),
        *(46.6, _NONE, 24.2, 21.3, 26.5),
    ),
}
