"""The updates of a round side by side: one matrix with a row for each site, walked in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from sfl.core import arrays
from sfl.core.aggregator import sum_dtype
from sfl.core.check import check_finite
from sfl.core.task import Update
from sfl.errors import UpdateError
from sfl.types import Array, Parameters

__all__ = ["Stack"]

_ELEMENTS = 1 << 18  # float64 numbers in a block of all sites: 2 MB, which stay in the cache for a second look
Spec = tuple[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True)
class Stack:
    """Updates as rows. Weights are left behind: what a site says of its size must not weigh in a robust rule.

    A name that some site left out (a frozen layer) is zero there, as it is for the mean. All arithmetic is in float64,
    whole numbers (BatchNorm's counter) included; results are float32 where the first update is, else float64.

    Attributes:
        updates: In site order.
        specs: Shape and dtype of the aggregate's arrays, by name, in the order in which they first appear.
    """

    updates: tuple[Update, ...]
    specs: dict[str, Spec] = field(repr=False)

    @classmethod
    def of(cls, updates: Iterable[Update]) -> Self:
        """Stack them.

        Raises:
            UpdateError: If one holds NaN or inf, or an array of another shape than the first that has it. In a run
                neither arrives: the server's own check rejects such a reply.
        """
        kept = tuple(updates)
        specs: dict[str, Spec] = {}
        for update in kept:
            check_finite(update.site, update.delta)
            for name, value in update.delta.items():
                shape, _ = specs.setdefault(name, (value.shape, sum_dtype(value)))
                if value.shape != shape:
                    raise UpdateError(f"{update.site}: {name!r} must have shape {shape}, got {value.shape}.")
        return cls(kept, specs)

    def __len__(self) -> int:
        return len(self.updates)

    def subset(self, rows: Sequence[int]) -> Self:
        """Some of the rows; the arrays of the aggregate stay the same."""
        return replace(self, updates=tuple(self.updates[row] for row in rows))

    def blocks(self) -> Iterator[tuple[str, slice, Array]]:
        """Name, place in the flat array, and the rows' elements there.

        The block is float64 of shape (rows, k) and valid until the next is drawn; it may be written to.
        """
        width = max(_ELEMENTS // max(len(self), 1), 1)
        memory = np.empty((len(self), width))
        for name, (shape, _) in self.specs.items():
            rows = [_flat(update.delta, name) for update in self.updates]
            size = int(np.prod(shape, dtype=np.int64))
            for start in range(0, size, width):
                place = slice(start, min(start + width, size))
                block = memory[:, : place.stop - start]
                for row, values in zip(block, rows, strict=True):
                    row[...] = 0.0 if values is None else values[place]
                yield name, place, block

    def aligned(self, parameters: Parameters) -> Callable[[str, slice], Array | float]:
        """What other arrays hold at a block's place; zero where they lack the name.

        Raises:
            UpdateError: If one of them has another shape.
        """
        for name, (shape, _) in self.specs.items():
            if name in parameters and parameters[name].shape != shape:
                raise UpdateError(f"{name!r} must have shape {shape}, got {parameters[name].shape}.")
        flat = {name: _flat(parameters, name) for name in self.specs}

        def at(name: str, place: slice) -> Array | float:
            values = flat[name]
            return 0.0 if values is None else values[place]

        return at

    def coordinatewise(self, rule: Callable[[Array], Array]) -> Parameters:
        """The aggregate whose every coordinate follows from the sites' values of it.

        Args:
            rule: From shape (k, sites), float64 and its to write to, to shape (k,).
        """
        out = arrays.empty(self.specs)
        for name, place, block in self.blocks():
            out[name].reshape(-1)[place] = rule(np.ascontiguousarray(block.T))
        return out

    def combined(self, weights: Array) -> Parameters:
        """Σ wᵢ xᵢ for weights of shape (sites,); rows of weight zero are not read."""
        used = np.flatnonzero(weights)
        out = arrays.empty(self.specs)
        for name, place, block in self.subset(used.tolist()).blocks():
            out[name].reshape(-1)[place] = weights[used] @ block
        return out

    def mixed(self, weights: Array, names: Sequence[str]) -> list[Update]:
        """One new update for each row of ``weights``, shape (new, sites), under these names and of weight one."""
        out = [arrays.empty(self.specs) for _ in names]
        for name, place, block in self.blocks():
            for target, row in zip(out, weights @ block, strict=True):
                target[name].reshape(-1)[place] = row
        return [Update(name, delta, 1.0) for name, delta in zip(names, out, strict=True)]


def _flat(parameters: Parameters, name: str) -> Array | None:
    value = parameters.get(name)
    return None if value is None else value.reshape(-1)
