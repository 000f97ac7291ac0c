"""What a corpus says about a model's weights: collected once, kept in a file, read by merges.

`fisher` is one number a parameter, `gram` one matrix an input of linear layers. Both are float32 in
one safetensors file, of which a merge reads one tensor at a time. What merges make of them is
`informed.py`.

Shapes: S positions of a sequence, V vocabulary, in: inputs of a linear layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusion.corpus import Piece
from fusion.distributions import read_block
from fusion.errors import RunError
from fusion.merging import COLLECTED
from fusion.models import HEAD_CHUNK, causal_pattern, hidden_states, logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion.checkpoints import Checkpoint

FILE = "statistics.safetensors"


class Statistics:
    """The statistics of one model, memory-mapped."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """Raises RunError if the file is not there, not whole or no statistics."""
        self.path = folder / FILE
        with _reading(self.path):
            self._file: Any = stack.enter_context(safe_open(self.path, framework="pt"))
            header = json.loads(self._file.metadata()["statistics"])
            self.kind, self.mean = str(header["kind"]), float(header["mean"])
            self._place = {name: name for name in self._file.keys()} | header["same"]  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._place

    @property
    def names(self) -> list[str]:
        """The tensors that a file of weights must hold, too; a tied head may be left out there."""
        return sorted(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Of what is held for a tensor."""
        return tuple(self._file.get_slice(self._place[name]).get_shape())

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether what is held for a tensor is of a tensor of that shape."""
        held = self.shape(name)
        return held == shape if self.kind == "fisher" else held == (shape[-1], shape[-1])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """What is held for a tensor; of `fisher` the rows from start to below stop.

        Rows that the model did not have, in an embedding that was extended, are 0.
        """
        with _reading(self.path):
            if self.kind != "fisher" or stop is None:
                return self._file.get_tensor(self._place[name])
            rows = self._file.get_slice(self._place[name])[start:stop]
            missing = stop - start - len(rows)
            return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def opened_statistics(
    paths: Sequence[Path],
    method: str,
    folders: Sequence[Path],
    inputs: Sequence[Checkpoint],
    stack: ExitStack,
) -> list[Statistics]:
    """The statistics that a merge method takes, one for each model; empty if it takes none.

    Raises RunError if they are not there, of another kind, or not of these models' tensors.
    """
    if method not in COLLECTED:
        return []
    kind, _ = COLLECTED[method]
    if len(paths) != len(folders):
        raise RunError(
            f"merge method {method} takes statistics of each model: {len(folders)} folders of "
            f"`statistics.collect`, not {len(paths)}"
        )
    found = [Statistics(path, stack) for path in paths]
    for one, folder, model in zip(found, folders, inputs, strict=True):
        if one.kind != kind:
            raise RunError(f"{one.path}: holds {one.kind}, but {method} takes {kind}")
        for name in one.names:
            if name not in model.files or not one.fits(name, model.stored(name)):
                raise RunError(
                    f"{one.path}: holds {name} for {one.shape(name)}, which is not in {folder}; "
                    "collect the statistics of that model"
                )
    return found


def collect(
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[Sequence[Piece]],
    folder: Path,
    labels: str = "data",
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    r"""Write a model's statistics over blocks into a folder; facts about them are returned.

    `fisher`, with g_s the gradient of the log-probability of sequence s, and T its predicted
    positions in all:

        F = Σ_s g_s² / Σ_s T_s,   g_s = ∇ Σ_t log p(y_t | x_<t),   squares element by element

    A sequence is a piece of a block, which sees nothing else; g_s is of the whole sequence, never
    of a batch. labels: `data`, y is the next token of the text (the empirical Fisher), or `model`,
    y is drawn from the model's own prediction (one draw a position, by `seed`), of which the
    expectation is the Fisher information. nats² a token.

    `gram`: XᵀX of the inputs X (positions, in) of every linear layer; layers that read the same
    input share one. A head that is tied to the embedding is no linear layer of its own.

    Raises ValueError for another kind, RunError if a number is not finite. Memory: the model, its
    statistics, and a few gradients.
    Source: 2111.09832 (fisher), 2212.09849 (gram).
    """
    if kind not in COLLECTORS:
        raise ValueError(f"no statistics '{kind}'; there are: {', '.join(COLLECTORS)}")
    generator = torch.Generator().manual_seed(seed) if labels == "model" else None
    found, same, counts = COLLECTORS[kind](model, tokenizer, blocks, generator, progress)
    progress(len(blocks))
    numbers = sum(tensor.numel() for tensor in found.values())
    sums = [float(tensor.sum(dtype=torch.float64)) for tensor in found.values()]
    if not all(map(math.isfinite, sums)):
        raise RunError(f"{folder}: the {kind} statistics are not finite: the model is broken")
    header = {"kind": kind, "mean": math.fsum(sums) / max(1, numbers), "same": same}
    partial = folder / f".{FILE}"
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in sorted(found.items())},
        partial,
        metadata={"statistics": json.dumps(header)},
    )
    partial.replace(folder / FILE)
    facts = {"tensors": len(found), "numbers": numbers, "bytes": (folder / FILE).stat().st_size}
    return {**facts, **counts, "blocks": len(blocks), "mean": header["mean"], "dtype": "float32"}


Found = tuple[dict[str, Tensor], dict[str, str], dict[str, int]]  # by name; the same; counts


def _fisher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[Sequence[Piece]],
    generator: torch.Generator | None,
    progress: Callable[[int], None],
) -> Found:
    named = dict(model.named_parameters())
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}

    def square(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            found[name].addcmul_(parameter.grad, parameter.grad)
            parameter.grad = None  # so that no two tensors' gradients wait for each other

        return hook

    hooks = [p.register_post_accumulate_grad_hook(square(name)) for name, p in named.items()]
    counts = {"sequences": 0, "tokens": 0}
    try:
        for number, block in enumerate(blocks):
            progress(number)
            for piece in block:
                predicted = _backward(model, tokenizer, piece, generator)
                counts["sequences"] += predicted > 0
                counts["tokens"] += predicted
    finally:
        for hook in hooks:
            hook.remove()
    for tensor in found.values():
        tensor /= max(1, counts["tokens"])
    return found, _tied(model, named), counts


def _backward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    piece: Piece,
    generator: torch.Generator | None,
) -> int:
    """Let the gradient of one sequence's log-probability flow; how many tokens it predicts."""
    ids, segments, positions, _ = read_block(tokenizer, [piece], model.device)
    if ids.shape[1] < 2:
        return 0
    pattern = causal_pattern(segments, torch.ones_like(segments, dtype=torch.bool))
    hidden = hidden_states(model, ids, positions, pattern)[0, :-1]
    parts = []
    for part, following in zip(hidden.split(HEAD_CHUNK), ids[0, 1:].split(HEAD_CHUNK), strict=True):
        if generator:
            with torch.no_grad():
                chances = logits(model, part).softmax(-1).cpu()
            following = torch.multinomial(chances, 1, generator=generator)[:, 0].to(part.device)
        # Logits of a whole sequence would be the largest tensor here by far.
        parts.append(checkpoint(_surprise, model, part, following, use_reentrant=False))
    torch.stack(parts).sum().backward()
    return len(hidden)


def _surprise(model: PreTrainedModel, hidden: Tensor, following: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits(model, hidden), following, reduction="sum")


def _tied(model: PreTrainedModel, named: dict[str, nn.Parameter]) -> dict[str, str]:
    """Further names of parameters, such as a head that is the embedding, by the one they have."""
    places = {id(parameter): name for name, parameter in named.items()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: places[id(p)] for name, p in every if places[id(p)] != name}


def _gram(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[Sequence[Piece]],
    generator: torch.Generator | None,
    progress: Callable[[int], None],
) -> Found:
    found: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    last: list[Any] = [None, ""]  # the input that was added last, and its name

    def add(name: str, given: Tensor) -> None:
        if given is last[0] and (name in same or name not in found):
            same[name] = last[1]
            return
        last[:] = given, name
        rows = given.detach().reshape(-1, given.shape[-1]).float()
        if name not in found:
            found[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        found[name].addmm_(rows.T, rows)

    head = model.get_output_embeddings()
    tied = set(_tied(model, dict(model.named_parameters())))
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    own_head = next((n for n, m in layers.items() if m is head and n not in tied), None)
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
        for name, layer in layers.items()
        if layer is not head
    ]
    positions_in_all = 0
    try:
        with torch.inference_mode():
            for number, block in enumerate(blocks):
                progress(number)
                ids, segments, positions, _ = read_block(tokenizer, block, model.device)
                pattern = causal_pattern(segments, torch.ones_like(segments, dtype=torch.bool))
                hidden = hidden_states(model, ids, positions, pattern)
                positions_in_all += ids.shape[1]
                if own_head:
                    add(own_head, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    sequences = sum(len(block) for block in blocks)
    return found, same, {"sequences": sequences, "tokens": positions_in_all}


COLLECTORS: dict[str, Callable[..., Found]] = {"fisher": _fisher, "gram": _gram}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: cannot be read as statistics ({type(error).__name__}: {error}); delete "
            f"{path.parent} and run again"
        ) from error
