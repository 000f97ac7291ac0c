"""Merged tensors in pieces of whole rows, so that memory holds a few pieces and never a model.

What a method finds over a tensor or a model (its line in STATISTICS) is found over the same pieces
first. Pieces are worked on side by side, in as many threads as torch would use, each one thread of
its own; they are put together in their order, and where they are cut depends on the shape alone,
so not a bit depends on who reads them. A method without row-wise arithmetic takes whole tensors,
one after another.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion.merging import MERGE_METHODS, STATISTICS, by_rows, context, over_model
from fusion.statistics import Statistics

if TYPE_CHECKING:
    from fusion.checkpoints import Checkpoint

PIECE = 1 << 19  # elements of one model's tensor at once, at least eight rows
SMALL = 4 * PIECE  # a tensor of so many elements at most is one thread's work
STEP = 8  # a piece starts at a multiple of so many rows, as draws come in eights


class Pieces:
    """The same pieces of several checkpoints and a base, of one tensor or of more; re-iterable."""

    def __init__(
        self,
        inputs: Sequence[Checkpoint],
        base: Checkpoint | None,
        names: Sequence[str],
        cut: bool,
        threads: ThreadPoolExecutor | None = None,
    ) -> None:
        self.inputs, self.base, self.names, self.cut = inputs, base, names, cut
        self.threads = threads

    def __iter__(self) -> Iterator[tuple[str, list[Tensor], Tensor | None]]:
        for name, start, stop in self.places():
            yield name, *self.read(name, start, stop)

    def map(self, work: Callable[..., Any]) -> Iterator[Any]:
        """work(place of its first element, name, models, base) of each piece, in order."""
        calls = (partial(self._call, work, *place) for place in self.places())
        return _side_by_side(self.threads, calls)

    @property
    def size(self) -> int:
        """Elements of one model in all."""
        return sum(prod(self.inputs[0].shape(name)) for name in self.names)

    def sample(self, most: int) -> list[tuple[str, list[Tensor], Tensor | None]]:
        """Whole rows from all over each tensor, about `most` elements in all, spread by size."""
        total = self.size
        out = []
        for name in self.names:
            shape = self.inputs[0].shape(name)
            if not shape or not prod(shape):
                continue
            width = prod(shape[1:])
            rows = min(shape[0], max(1, most * shape[0] // max(1, total)))
            run = max(1, min(rows, -(-1024 // width)))  # neighbours: a page of the file at a time
            step = max(run, (shape[0] - run) // max(1, rows // run - 1))
            read = [one.read(name) for one in (*self.inputs, *([self.base] if self.base else []))]
            spread = [tensor.unfold(0, run, step).float().reshape(-1) for tensor in read]
            models, base = spread[: len(self.inputs)], spread[len(self.inputs) :]
            out.append((name, models, base[0] if base else None))
        return out

    def places(self) -> Iterator[tuple[str, int, int | None]]:
        """Name, first row and end of each piece."""
        for name in self.names:
            shape = self.inputs[0].shape(name)
            for start, stop in _cuts(shape) if self.cut else [(0, None)]:
                yield name, start, stop

    def read(self, name: str, start: int, stop: int | None) -> tuple[list[Tensor], Tensor | None]:
        """Models and base of a piece, float32."""
        tensors = [one.read(name, start, stop).float() for one in self.inputs]
        return tensors, self.base.read(name, start, stop).float() if self.base else None

    def _call(self, work: Callable[..., Any], name: str, start: int, stop: int | None) -> Any:
        return work(
            start * prod(self.inputs[0].shape(name)[1:]), name, *self.read(name, start, stop)
        )


def _cuts(shape: Sequence[int]) -> list[tuple[int, int | None]]:
    """First and last row of each piece."""
    if not shape:
        return [(0, None)]
    rows = max(STEP, PIECE // max(1, prod(shape[1:])) // STEP * STEP)
    return [(at, min(at + rows, shape[0])) for at in range(0, max(1, shape[0]), rows)]


def _side_by_side(
    threads: ThreadPoolExecutor | None, calls: Iterable[Callable[[], Any]]
) -> Iterator[Any]:
    """What each call gives, in order; a few are under way at once."""
    waiting: deque[Future[Any]] = deque()
    try:
        for call in calls:
            if threads is None or isinstance(call, Alone):
                yield from (waiting.popleft().result() for _ in range(len(waiting)))
                yield call()
                continue
            waiting.append(threads.submit(call))
            if len(waiting) > 2 * threads._max_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class Alone(partial[Any]):
    """A call with nothing beside it, and all threads for itself: a whole tensor is large."""


class Merging:
    """One method at work on opened checkpoints; a context, which ends its threads."""

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
        self.inputs, self.base, self.names = inputs, base, frozenset(names)
        self.cut = by_rows(method, parameters)
        self.known = {"models": models} if models is not None else {}
        self.collected = statistics
        # In units of their mean, so that a method's floor means the same for every model.
        self.unit = math.fsum(one.mean for one in statistics) / max(1, len(statistics)) or 1.0
        self.found: Any = None
        self.threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Merging:
        self.before = torch.get_num_threads()
        self.threads = ThreadPoolExecutor(
            self.before, initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            if over_model(self.method, self.parameters):
                self.found = self._statistics(sorted(self.names), self.threads)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self.threads
        self.threads.shutdown(cancel_futures=True)
        torch.set_num_threads(self.before)

    def pieces(self, names: Iterable[str], dtype: torch.dtype) -> Iterator[Tensor]:
        """The merged tensors one after another, piece by piece; others as the first model's."""
        yield from _side_by_side(
            self.threads, (c for name in names for c in self._calls(name, dtype))
        )

    def _calls(self, name: str, dtype: torch.dtype) -> Iterator[Callable[[], Tensor]]:
        if name not in self.names:
            yield partial(self.inputs[0].read, name)
            return
        if "found" in context(self.method) and self.found is None:
            if self.cut and prod(self.inputs[0].shape(name)) <= SMALL:
                yield partial(self._whole, name, dtype)
                return
            yield from self._parts(name, dtype, self._statistics([name], self.threads))
        else:
            yield from self._parts(name, dtype, self.found)

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of few pieces, one after another: what is found is still near when it merges."""
        found = self._statistics([name])
        return torch.cat([call().reshape(-1) for call in self._parts(name, dtype, found)])

    def _parts(self, name: str, dtype: torch.dtype, found: Any) -> Iterator[Callable[[], Tensor]]:
        takes = context(self.method)
        known = {**self.known, "name": name, "found": found}
        collected = self.collected if all(name in one for one in self.collected) else ()
        cut = self.cut and all(one.kind == "fisher" for one in collected)
        known = {key: value for key, value in known.items() if key in takes}
        pieces = Pieces(self.inputs, self.base, [name], cut)
        for _, start, stop in pieces.places():
            yield (partial if cut else Alone)(
                self._piece, pieces, name, start, stop, known, collected, dtype
            )

    def _piece(
        self,
        pieces: Pieces,
        name: str,
        start: int,
        stop: int | None,
        known: Mapping[str, Any],
        collected: Sequence[Statistics],
        dtype: torch.dtype,
    ) -> Tensor:
        tensors, base = pieces.read(name, start, stop)
        given, takes = dict(known), context(self.method)
        if "start" in takes:
            given["start"] = start * prod(self.inputs[0].shape(name)[1:])
        if collected and "statistics" in takes:
            given["statistics"] = [one.read(name, start, stop) / self.unit for one in collected]
        return MERGE_METHODS[self.method](tensors, base, **self.parameters, **given).to(dtype)

    def _statistics(self, names: Sequence[str], threads: ThreadPoolExecutor | None = None) -> Any:
        function = STATISTICS[self.method]
        takes = inspect.signature(function).parameters
        given = {key: value for key, value in self.parameters.items() if key in takes}
        pieces = Pieces(self.inputs, self.base, names, True, threads)
        return function(pieces, **given)
