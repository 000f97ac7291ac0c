"""How fast this machine computes: FLOP/s of a small model when it reads, writes and trains.

A calibration of some seconds. Larger models reach more, memory-bound writing less; an estimate made
from it is good to about a factor of two, which is what deciding whether to start takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fusion.flops import FlopCounter, training
from fusion.models import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECONDS = 1.0  # of each kind of work
GPUS = {  # dense FLOP/s in bfloat16, memory's bytes a second, its bytes: makers' data sheets, SXM
    "a100": (3.12e14, 2.04e12, 80 * 10**9),
    "h100": (9.89e14, 3.35e12, 80 * 10**9),
    "h200": (9.89e14, 4.80e12, 141 * 10**9),
}
SUSTAINED = 0.4  # of a data sheet's figures, that long work is taken to reach
ROWS, LENGTH = 4, 256  # read and trained on; of as many rows one position each is written


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOP/s: reading whole rows, writing one token a row at a time, training."""

    read: float
    write: float
    train: float


def measure(device: str = "cpu", dtype: str = "float32") -> Rates:
    """The machine's rates with a random decoder of 26 million weights, 4 rows of 256 tokens.

    device and dtype as in a recipe. Takes about four seconds on a CPU.
    """
    model = _decoder()
    torch.nn.Module.to(model, device=device, dtype=DTYPES[dtype])
    ids = torch.arange(ROWS * LENGTH, device=device).view(ROWS, LENGTH) % model.config.vocab_size
    counter = FlopCounter(model)
    counter.remove()
    size, each = counter.size, [LENGTH] * ROWS

    def read() -> int:
        with torch.inference_mode():
            model(ids)
        return training(size, each) // 3

    def train() -> int:
        model(ids, labels=ids).loss.backward()
        model.zero_grad()
        return training(size, each)

    cache = None
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values

    def write() -> int:
        with torch.inference_mode():
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        seen = cache.get_seq_length() if cache is not None else 0
        return ROWS * (size.per_token + 4 * size.attention * seen)

    return Rates(_rate(read, device), _rate(write, device), _rate(train, device))


def stated(gpu: str, rows: int) -> Rates:
    """What a GPU of the data sheets is taken to sustain in bfloat16; nothing is measured.

        read = train = s·F,   write = s·min(F, rows·B)

    F FLOP/s, B bytes a second, s = SUSTAINED. Writing a token for each of so many rows moves every
    weight once, 2 bytes, for 2·rows FLOPs of it (the roofline of Williams et al. 2009).
    """
    flops, moved, _ = GPUS[gpu]
    return Rates(SUSTAINED * flops, SUSTAINED * min(flops, rows * moved), SUSTAINED * flops)


def bfloat16_slowdown(size: int = 256) -> float:
    """How many times as long as in float32 this processor takes for a product in bfloat16.

    Below 1 where it has instructions for it; without them 10 to 100.
    """
    best = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(size, size, dtype=dtype)
        seconds = float("inf")
        for _ in range(4):
            started = time.perf_counter()
            x @ x
            seconds = min(seconds, time.perf_counter() - started)
        best.append(seconds)
    return best[0] / best[1]


def _decoder() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=512,
                intermediate_size=1536,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=8,
                vocab_size=16_384,
            )
        )


def _rate(work: Callable[[], int], device: str) -> float:
    """FLOP/s of repeated work, the first time left out."""
    work()
    _wait(device)
    started, flops = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        flops += work()
        _wait(device)
    return flops / (time.perf_counter() - started)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
