"""Low-rank adapters: changes of a model's matrices are trained, and nothing else of it.

    W′ = W + α/r · B·A,      A of shape (r, in), B (out, r), B = 0 at first

Source: LoRA, Hu et al. 2021 (2106.09685). The adapters are peft's; which matrices have one is
decided here, by names that can be looked up before anything is loaded. Output head, embeddings,
norms and biases never have one. What comes out is an ordinary model folder, like that of all other
training.
"""

from __future__ import annotations

import difflib
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusion.errors import RecipeError, RunError
from fusion.models import load_model
from fusion.spec import LoRA

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "default"  # what peft calls an adapter that nobody named


def require() -> None:
    """RunError if peft is not installed."""
    if find_spec("peft") is None:
        raise RunError("train.lora needs peft, which is not installed: pip install 'kfuse[lora]'")


def layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that can have an adapter, by name: all linear ones but the output head.

    Experts that a model keeps as one tensor are no layers, and have none.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(end.weight) for end in ends}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in tables
    }


def chosen(model: PreTrainedModel, lora: LoRA, where: str = "train") -> dict[str, nn.Module]:
    """The layers that get an adapter; the model may be without its weights (`models.skeleton`).

    where: of the section in the recipe. RecipeError for targets that name no layer, with the names
    that there are.
    """
    known = layers(model)
    if lora.targets == "all-linear":
        return known
    found = {
        target: [n for n in known if f".{n}".endswith(f".{target}")] for target in lora.targets
    }
    lost = [target for target, names in found.items() if not names]
    if lost:
        ends = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
        near = difflib.get_close_matches(lost[0], ends, n=1)
        raise RecipeError(
            f"{where}.lora.targets: {', '.join(map(repr, lost))} names no linear layer of this "
            f"{model.config.model_type} model; allowed: all-linear, or ends of names, here "
            f"{', '.join(ends)}{f' ({near[0]}?)' if near else ''}; the output head and embeddings "
            "are never adapted"
        )
    named = {name for names in found.values() for name in names}
    return {name: module for name, module in known.items() if name in named}


def adapter_weights(model: PreTrainedModel, lora: LoRA, where: str = "train") -> int:
    """How many weights are trained: r · (in + out) of each matrix."""
    found = chosen(model, lora, where).values()
    return sum(lora.rank * sum(cast("Tensor", layer.weight).shape) for layer in found)


def adapt(model: PreTrainedModel, lora: LoRA, seed: int) -> Any:
    """The model as peft wraps it, with float32 adapters; all other weights are frozen.

    The model's own `forward`, whatever it is by then, stays what is called. RunError if peft is
    missing, or adapts other layers than it was told.
    """
    require()
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    wanted = chosen(model, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=lora.dropout,
        target_modules=list(wanted),
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in wanted.values()),
    )
    # peft draws from the global generator; here it draws alike whatever was drawn before.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated"
        )  # peft's call
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if adapted != wanted.keys():
        odd = ", ".join(sorted(adapted ^ wanted.keys())[:3])
        raise RunError(
            f"train.lora.targets: peft does not adapt the layers that are named ({odd}); name "
            "others, or train without lora"
        )
    return wrapped


def write(wrapped: Any, init: str | Path, out: Path) -> None:
    """The trained model as an ordinary folder in float32, its adapters added to their matrices.

    What they do not change keeps its bytes: other tensors, and elements whose change is 0 (−0
    would else become 0).
    """
    from peft.tuners.lora import LoraLayer

    model = wrapped.get_base_model()
    found: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    # DeepSpeed rounds all weights that it computes with in bfloat16; what was given is in `init`.
    rounded = model.dtype != torch.float32
    exact = load_model(init) if rounded else wrapped.unload()
    exact.config.use_cache = model.config.use_cache
    with torch.no_grad():
        for name, layer in found.items():
            weight = cast("Tensor", exact.get_submodule(name).weight)
            for part in (layer.lora_A, layer.lora_B):
                part.float()
            change = layer.get_delta_weight(NAME).to(weight.device)
            weight.copy_(torch.where(change == 0, weight, weight + change))
    exact.save_pretrained(out)
