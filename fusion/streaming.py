"""A merged tensor in pieces of whole rows, so that memory holds a few pieces and never a model.

What a method finds over a tensor or a model (its line in STATISTICS) is found over the same pieces
first. Where they are cut depends on the shape alone, so not a bit depends on who reads them. The
methods that rank the elements of a tensor take it in one piece.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusion.merging import MERGE_METHODS, STATISTICS, by_rows, context, over_model
from fusion.statistics import Statistics

if TYPE_CHECKING:
    from fusion.checkpoints import Checkpoint

PIECE = 1 << 20  # elements of one model's tensor at once, at least one row


class Pieces:
    """The same pieces of several checkpoints and a base, of one tensor or of more; re-iterable."""

    def __init__(
        self, inputs: Sequence[Checkpoint], base: Checkpoint | None, names: Sequence[str], cut: bool
    ) -> None:
        self.inputs, self.base, self.names, self.cut = inputs, base, names, cut

    def __iter__(self) -> Iterator[tuple[str, list[Tensor], Tensor | None]]:
        for name in self.names:
            for _, tensors, base in self.of(name):
                yield name, tensors, base

    def of(self, name: str) -> Iterator[tuple[int, list[Tensor], Tensor | None]]:
        """(place of its first element, models, base), float32, of each piece of a tensor."""
        shape = self.inputs[0].shape(name)
        for start, stop in _cuts(shape) if self.cut else [(0, None)]:
            tensors = [one.read(name, start, stop).float() for one in self.inputs]
            base = self.base.read(name, start, stop).float() if self.base else None
            yield start * prod(shape[1:]), tensors, base


def _cuts(shape: Sequence[int]) -> list[tuple[int, int | None]]:
    """First and last row of each piece; multiples of four rows, as draws come in fours."""
    if not shape:
        return [(0, None)]
    rows = max(4, PIECE // max(1, prod(shape[1:])) // 4 * 4)
    return [(at, min(at + rows, shape[0])) for at in range(0, max(1, shape[0]), rows)]


class Merging:
    """One method at work on opened checkpoints."""

    def __init__(
        self,
        inputs: Sequence[Checkpoint],
        base: Checkpoint | None,
        method: str,
        parameters: Mapping[str, Any],
        names: Sequence[str],
        models: Sequence[str] | None,
        statistics: Sequence[Statistics] = (),
    ) -> None:
        """`names`: all tensors that are merged; `models`: what draws tell models apart by.

        `statistics`: of each model, if the method takes them.
        """
        self.method, self.parameters = method, dict(parameters)
        self.inputs, self.base = inputs, base
        self.cut = by_rows(method, parameters)
        self.known = {"models": models} if models is not None else {}
        self.collected = statistics
        # In units of their mean, so that a method's floor means the same for every model.
        self.unit = math.fsum(one.mean for one in statistics) / max(1, len(statistics)) or 1.0
        self.found: Any = None
        if over_model(method, parameters):
            self.found = self._statistics(names)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The merged tensor, piece by piece."""
        takes = context(self.method)
        known = {**self.known, "name": name}
        if "found" in takes:
            known["found"] = self.found if self.found is not None else self._statistics([name])
        collected = self.collected if all(name in one for one in self.collected) else ()
        cut = self.cut and all(one.kind == "fisher" for one in collected)
        for start, tensors, base in Pieces(self.inputs, self.base, [name], cut).of(name):
            here: dict[str, Any] = {**known, "start": start}
            if collected:
                here["statistics"] = [self._of(one, name, start, tensors[0]) for one in collected]
            given = {key: value for key, value in here.items() if key in takes}
            yield MERGE_METHODS[self.method](tensors, base, **self.parameters, **given)

    def _of(self, one: Statistics, name: str, start: int, piece: Tensor) -> Tensor:
        """What a model's statistics say of a piece."""
        row = start // max(1, prod(piece.shape[1:]))
        stop = row + len(piece) if piece.dim() else None
        return one.read(name, row, stop) / self.unit

    def _statistics(self, names: Sequence[str]) -> Any:
        function = STATISTICS[self.method]
        takes = inspect.signature(function).parameters
        given = {key: value for key, value in self.parameters.items() if key in takes}
        return function(Pieces(self.inputs, self.base, names, cut=True), **given)
