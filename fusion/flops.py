"""Floating-point operations of a model, counted from its configuration and from what it reads.

Clocks play no part, so equal work counts equally on every machine. A multiply and an add are two.

    forward of B rows of Q new positions that see K positions = 2·N·B·Q + 4·A·B·Q·K
    forward of a whole row of T tokens                        = 2·N·T + 4·A·T²
    training on it                                            = 3 · forward
    training P weights of adapters alone                      = 3 · forward + (6·P − 2·N)·T

N are the weights of matrix products, the output head included (a look-up in an embedding is none);
A is layers · heads · width of a head. This is what torch's FlopCounterMode counts. Norms,
activations and softmax are left out; masks are not deducted, since what they hide is computed all
the same; recomputing for `gradient_checkpointing` does not count, since it changes no result.
2·N and 6·N a token: Kaplan et al. 2020 (2001.08361), section 2.1.

Shapes: B rows, Q new positions, K positions in reach, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Size:
    """What decides a model's FLOPs: weights of products in its body and head, and A."""

    body: int
    head: int
    attention: int

    @property
    def per_token(self) -> int:
        """2·N: one token, its attention to others aside."""
        return 2 * (self.body + self.head)


def size(model: PreTrainedModel) -> Size:
    """The size of a model, which may be without its weights (`models.skeleton`).

    Experts of which a token passes some count by that share.
    """
    config = model.config.get_text_config(decoder=True)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings().weight
    share = _active_share(config)
    body = sum(
        round(weight.numel() * (share if ".experts." in name else 1))
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and id(weight) not in tables and weight is not head
    )
    heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return Size(body, head.numel(), _attending_layers(config) * heads * width)


def _active_share(config: Any) -> float:
    """Of a layer's experts, how many a token passes."""
    many = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    few = getattr(config, "num_experts_per_tok", None)
    return few / many if many and few else 1.0


def _attending_layers(config: Any) -> int:
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return int(config.num_hidden_layers)
    return sum(kind.endswith("attention") and kind != "linear_attention" for kind in kinds)


def forward(size: Size, lengths: Iterable[int]) -> int:
    """FLOPs of reading whole rows of these lengths, every position through the head."""
    return sum(size.per_token * n + 4 * size.attention * n * n for n in lengths)


def training(size: Size, lengths: Iterable[int], adapters: int | None = None) -> int:
    """FLOPs of training once on rows of these lengths: the backward pass is two forward ones.

    adapters: how many weights adapters have, if only those are trained. All other weights then have
    no gradients, which saves one of their three products; what lies before the first adapter, and
    needs no gradient at all, is counted like the rest.
    """
    rows = list(lengths)
    if adapters is None:
        return 3 * forward(size, rows)
    return 3 * forward(replace(size, body=size.body + adapters), rows) - size.per_token * sum(rows)


def steps_of(blocks: int, batch: int, epochs: int) -> int:
    """Optimizer steps of so many passes; the last of a pass takes what is left of it."""
    return max(1, -(-blocks // batch)) * epochs


def steps_within(costs: list[int], batch: int, budget: int) -> int:
    """The first optimizer step at which training has cost at least the budget; at least one.

    costs: of each block; they are gone through in order, again and again, `batch` a step, and the
    last step of a pass takes what is left of it.
    """
    steps = [sum(costs[start : start + batch]) for start in range(0, len(costs), batch)]
    passes, left = divmod(budget, sum(steps))
    count = passes * len(steps)
    for cost in steps:
        if left <= 0:
            break
        left -= cost
        count += 1
    return max(1, count)


def of_steps(costs: list[int], batch: int, steps: int) -> int:
    """What so many steps over blocks of these costs come to; `steps_within` says how they go."""
    each = [sum(costs[start : start + batch]) for start in range(0, len(costs), batch)]
    passes, rest = divmod(steps, len(each))
    return passes * sum(each) + sum(each[:rest])


class FlopCounter:
    """Adds up the FLOPs of everything that goes through a model, until `remove`.

    flops: so far; padding counts, since it is computed, too. The head counts the positions that it
    is given, which when measuring are few.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.size = size(model)
        self.flops = 0
        self.device = model.device
        # Not the base model: OPT's causal LM calls its decoder by itself.
        self.hooks = [
            model.get_decoder().register_forward_pre_hook(self._body, with_kwargs=True),
            model.get_output_embeddings().register_forward_pre_hook(self._head),
        ]

    def remove(self) -> None:
        """Count no longer."""
        for hook in self.hooks:
            hook.remove()

    def _body(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"] if ids is None else ids
        rows, new = ids.shape[:2]
        reach = _reach(kwargs, new)
        self.flops += 2 * self.size.body * rows * new + 4 * self.size.attention * rows * new * reach

    def _head(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.flops += 2 * self.size.head * (args[0].numel() // args[0].shape[-1])


def _reach(kwargs: dict[str, Any], new: int) -> int:
    """How many positions the new ones see: their mask says it, else the cache."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        mask = max(mask.values(), key=lambda kind: kind.shape[-1])
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return mask.shape[-1]
    cache = kwargs.get("past_key_values")
    return new + (int(cache.get_seq_length()) if cache is not None else 0)
