"""Architectures whose attention is unlike Llama's score and generate as in lm-eval, or say how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from harness.scoring import SharedPrefixLM, stock
from harness.tiny import _byte_level

LONG = "a teacher reads a long letter. Then my sister walks along the river, and nobody"
# Weights this large make far more than the tolerance of every position that is seen or not.
WIDE = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}


def configs(rows: int) -> dict[str, PretrainedConfig]:
    """Attention over a window shorter than the prompts; slopes for positions; learned positions."""
    return {
        "mistral": MistralConfig(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=8,
            max_position_embeddings=256,
            **WIDE,
        ),
        "gemma2": Gemma2Config(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=8,
            max_position_embeddings=256,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=16,
            pad_token_id=0,
            **WIDE,
        ),
        "bloom": BloomConfig(vocab_size=rows, hidden_size=32, n_layer=2, n_head=2, **WIDE),
        "gpt2": GPT2Config(
            vocab_size=rows, n_embd=32, n_layer=2, n_head=2, n_positions=256, **WIDE
        ),
    }


@pytest.fixture(scope="module", params=["mistral", "gemma2", "bloom", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / request.param
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level(), eos_token="<|end|>")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(configs(len(tokenizer))[request.param])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_scores_and_texts_are_those_of_lm_eval(folder: Path) -> None:
    ours, theirs = SharedPrefixLM(str(folder)), stock(str(folder), "cpu")
    ends = (" counts seven apples", " paints")
    choices = [
        Instance("loglikelihood", {}, (context, end), 0)
        for context in ("The baker", LONG, LONG * 5)
        for end in ends
    ]
    for mine, other in zip(
        ours.loglikelihood(choices), theirs.loglikelihood(choices, True), strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-3)
        assert mine[1] == other[1]
    how = {"until": ["never-said"], "max_gen_toks": 12, "do_sample": False}
    prompts = [Instance("generate_until", {}, (p, dict(how)), 0) for p in ("The baker", LONG)]
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, True)


def test_what_is_done_another_way_is_said(folder: Path) -> None:
    lm = SharedPrefixLM(str(folder))
    rows = folder.name in ("bloom", "gemma2")
    assert lm.engine["scoring"] == ("rows" if rows else "tree")
    assert [note.split(":")[0] for note in lm.notes] == [type(lm.model).__name__] * rows
