"""One key-value cache for rows that are fed at different paces, may take tokens back, and leave.

Shapes: B rows, Q new positions, D hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from fusion.models import hidden_states

ROOM = 128  # slots that a repeated row has beside what it has read


class _Reserved(DynamicLayer):
    """A cache layer that grows in large steps; the library's copies itself for every token."""

    room: list[Tensor]
    used: int
    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Append along the slots; everything so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room, self.used = [], 0
        new = key_states.shape[-2]
        if not self.room or self.used + new > self.room[0].shape[-2]:
            capacity = self.used + new + 64
            shape = (*key_states.shape[:-2], capacity, key_states.shape[-1])
            grown = [states.new_empty(shape) for states in (key_states, value_states)]
            if self.used:
                grown[0][..., : self.used, :] = self.keys
                grown[1][..., : self.used, :] = self.values
            self.room = grown
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[..., self.used : self.used + new, :] = states
        self.used += new
        self.keys, self.values = (room[..., : self.used, :] for room in self.room)
        return self.keys, self.values

    def rewind(self, slots: int) -> None:
        """Forget all but the first slots."""
        self.used = slots
        self.keys, self.values = (room[..., :slots, :] for room in self.room)

    def repeat(self, rows: int) -> None:
        """So many rows of the one that is here, with room for what they read next."""
        for place, states in enumerate((self.keys, self.values)):
            room = states.new_empty((rows, states.shape[1], self.used + ROOM, states.shape[3]))
            room[..., : self.used, :] = states
            self.room[place] = room
        self.keys, self.values = (room[..., : self.used, :] for room in self.room)

    def choose(self, rows: Tensor | None, slots: Tensor | None) -> None:
        """Keep these rows and slots only."""
        for name in ("keys", "values"):
            states = getattr(self, name)
            states = states if rows is None else states[rows]
            setattr(self, name, states if slots is None else states[:, :, slots])
        self.used = self.keys.shape[-2]
        self.room = [self.keys, self.values]


class GrowingCache:
    """Rows that are fed at different paces share one key-value cache; holes are masked.

    Row b's token at slot k counts if `valid[b, k]`; its position is `positions[b, k]`. A row may
    take tokens back: their slots become holes.
    """

    def __init__(self, model: Any, rows: int) -> None:
        self.model = model
        self.cache = Cache(layer_class_to_replicate=_Reserved)
        device = model.device
        self.valid = torch.zeros((rows, 0), dtype=torch.bool, device=device)
        self.positions = torch.zeros((rows, 0), dtype=torch.long, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def feed(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Append each row's new tokens, right-aligned; their hidden states, (B, width, D)."""
        width = max(len(ids) for ids in new)
        device = self.valid.device
        ids = torch.zeros((len(new), width), dtype=torch.long)
        here = torch.zeros((len(new), width), dtype=torch.bool)
        for row, tokens in enumerate(new):
            if tokens:
                ids[row, width - len(tokens) :] = torch.tensor(tokens)
                here[row, width - len(tokens) :] = True
        ids, here = ids.to(device), here.to(device)
        positions = self.lengths[:, None] + (here.cumsum(1) - 1).clamp_min(0)
        self.valid = torch.cat([self.valid, here], dim=1)
        self.positions = torch.cat([self.positions, positions], dim=1)
        past = self.valid.shape[1] - width
        slot = torch.arange(self.valid.shape[1], device=device)
        allowed = self.valid[:, None, :] & (slot[None, None, :] <= slot[past:][None, :, None])
        # Padding must look somewhere, else its softmax is 0/0: at itself.
        allowed = allowed | (slot[None, None, :] == slot[past:][None, :, None])
        self.lengths = self.lengths + here.sum(1)
        return hidden_states(self.model, ids, positions, allowed, self.positions, self.cache)

    def spread(self, rows: int) -> GrowingCache:
        """Another cache of this many rows, all with what the one row has read."""
        out = copy.copy(self)
        out.cache = copy.deepcopy(self.cache)
        for layer in out.cache.layers:
            assert isinstance(layer, _Reserved)
            layer.repeat(rows)
        out.valid, out.positions = (x.repeat(rows, 1) for x in (self.valid, self.positions))
        out.lengths = self.lengths.repeat(rows)
        return out

    def beside(self, ids_Q: Tensor, positions_Q: Tensor, allowed_QQ: Tensor) -> Tensor:
        """Hidden states (Q, D) of tokens after what the one row has read, which then forgets them.

        positions_Q count from the end of what was read; allowed_QQ: which of the new tokens see
        which; all see what was read.
        """
        past = self.valid.shape[1]
        read = torch.ones((len(ids_Q), past), dtype=torch.bool, device=ids_Q.device)
        positions = (positions_Q + past)[None]
        allowed = torch.cat([read, allowed_QQ], dim=1)[None]
        keys = torch.cat([self.positions, positions], dim=1)
        hidden = hidden_states(self.model, ids_Q[None], positions, allowed, keys, self.cache)
        for layer in self.cache.layers:
            assert isinstance(layer, _Reserved)
            layer.rewind(past)
        return hidden[0]

    def take_back(self, row: int, count: int) -> None:
        """Forget a row's last `count` tokens."""
        slots = self.valid[row].nonzero()[:, 0][-count:]
        self.valid[row, slots] = False
        self.lengths[row] -= count

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.valid, self.positions = self.valid[rows], self.positions[rows]
        self.lengths = self.lengths[rows]
        # Slots that no row uses any more (padding of finished rows) cost time for nothing.
        used = self.valid.any(dim=0)
        slots = used if (~used).sum() * 8 > used.numel() else None
        if slots is not None:
            self.valid, self.positions = self.valid[:, slots], self.positions[:, slots]
        for layer in self.cache.layers:
            assert isinstance(layer, _Reserved)
            layer.choose(rows, slots)
