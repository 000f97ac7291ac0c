"""Counted FLOPs against torch's own counter, and the steps that a budget comes to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig, OPTConfig

from fusion.flops import FlopCounter, Size, forward, of_steps, size, steps_within, training
from fusion.lora import adapt, adapter_weights
from fusion.models import causal_pattern, hidden_states, load_model, skeleton
from fusion.spec import LoRA


def eager(model: torch.nn.Module) -> torch.nn.Module:
    """Attention as two products, which torch's counter sees on every device."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    return model


@pytest.mark.parametrize("name", ["llama", "gemma", "neox"])
def test_forward_and_training_are_what_torch_counts(tiny: dict[str, Path], name: str) -> None:
    model = eager(load_model(tiny[name]))
    ids = torch.randint(0, 200, (1, 23))
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert forward(size(model), [23]) == whole.get_total_flops()
    with FlopCounterMode(display=False) as trained:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert training(size(model), [23]) == trained.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "gemma", "neox"])
def test_training_adapters_alone_is_what_torch_counts(tiny: dict[str, Path], name: str) -> None:
    pytest.importorskip("peft")
    model = eager(load_model(tiny[name]))
    whole, ids = size(model), torch.randint(0, 200, (1, 23))
    lora = LoRA(rank=2)
    trained = adapter_weights(model, lora)
    wrapped = adapt(model, lora, 0)  # type: ignore[arg-type]
    # What the first layer reads gets a gradient here, which nobody needs and the formula counts.
    model.enable_input_require_grads()  # type: ignore[operator]
    with FlopCounterMode(display=False) as counted:
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert training(whole, [23], trained) == counted.get_total_flops()
    assert training(whole, [23], trained) < training(whole, [23])


def test_a_skeleton_has_the_size_of_its_model(tiny: dict[str, Path]) -> None:
    for name in ("llama", "gemma", "neox"):
        assert size(skeleton(tiny[name])) == size(load_model(tiny[name]))


def test_experts_count_by_the_share_that_a_token_passes() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    found = size(AutoModelForCausalLM.from_config(config))
    attention = 2 * 32 * 32 + 2 * 32 * 16  # queries and outputs, keys and values
    assert found == Size(2 * (attention + 4 * 32 + 2 * 3 * 32 * 48), 64 * 32, 2 * 32)


def test_the_counter_sees_caches_patterns_and_which_positions_reach_the_head(
    tiny: dict[str, Path],
) -> None:
    model = eager(load_model(tiny["gemma"]))
    counter = FlopCounter(model)
    with FlopCounterMode(display=False) as torchs, torch.no_grad():
        ids = torch.randint(0, 200, (2, 11))
        segments = torch.ones_like(ids)
        positions = torch.arange(11).expand(2, -1)
        hidden = hidden_states(model, ids, positions, causal_pattern(segments, segments > 0))
        model.get_output_embeddings()(hidden[:, -3:])
        plain = model(input_ids=ids[:1, :5], use_cache=True)
        model(input_ids=ids[:1, 5:6], past_key_values=plain.past_key_values, use_cache=True)
    assert counter.flops == torchs.get_total_flops()


def test_a_decoder_inside_the_base_model_is_counted_whoever_calls_it() -> None:
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    model = AutoModelForCausalLM.from_config(config)
    counter, ids = FlopCounter(model), torch.randint(0, 60, (1, 9))
    model(input_ids=ids, use_cache=False)
    assert counter.flops == forward(counter.size, [9])
    counter.remove()
    model(input_ids=ids, use_cache=False)
    assert counter.flops == forward(counter.size, [9])


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(0, 200),
)
def test_a_budget_is_reached_by_its_last_step_and_not_before(
    costs: list[int], batch: int, budget: int
) -> None:
    each = [sum(costs[i : i + batch]) for i in range(0, len(costs), batch)]
    found = steps_within(costs, batch, budget)
    spent = [sum(each[k % len(each)] for k in range(n)) for n in (found - 1, found)]
    assert of_steps(costs, batch, found) == spent[1] >= budget
    assert spent[0] < budget or found == 1
