"""Named arrays as one row of bytes that travels piece by piece, so that no message grows with a model.

What is larger than ``ABOVE`` bytes does not travel with its task or its reply: before a task, its arrays are loaded
into the process of its site, and after a reply, the server draws them from there, in pieces of ``SIZE`` bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sfl.engine.shared import Layout
from sfl.types import Array, Parameters

ABOVE = 1 << 26
"""Bytes of arrays that one message carries at most."""
SIZE = 1 << 22
"""Bytes of a piece."""
PIECE = "piece"
"""The name of the one array of a message that carries a piece."""
_MOST_ARRAYS = 1 << 20


def of_piece(arrays: Mapping[str, Array]) -> Array:
    """The piece that a message carries.

    Raises:
        ValueError: If it carries none.
    """
    piece = arrays.get(PIECE)
    if piece is None or len(arrays) != 1 or piece.dtype != np.uint8 or piece.ndim != 1:
        raise ValueError(f"a message must carry one piece of bytes, got arrays {sorted(arrays)[:3]}.")
    return piece


def spans(nbytes: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each piece of a row.

    >>> list(spans(10, 4))
    [(0, 4), (4, 8), (8, 10)]
    """
    for start in range(0, nbytes, size):
        yield start, min(start + size, nbytes)


class Source:
    """Arrays that are read piece by piece; they are not copied.

    Args:
        parameters: The arrays.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._layout = Layout.of(parameters)

    @property
    def nbytes(self) -> int:
        """Bytes of the row: the arrays', with gaps that let each begin on a cache line."""
        return self._layout.nbytes

    @property
    def said(self) -> list[list[Any]]:
        """What the row holds, as JSON says it: name, dtype and shape of each array."""
        return [[name, _little(np.dtype(dtype)).str, list(shape)] for name, dtype, shape, _ in self._layout.entries]

    def read(self, start: int, stop: int) -> Parameters:
        """One piece, as the one array of a message."""
        piece = np.zeros(stop - start, np.uint8)
        for name, _, _, offset in self._layout.entries:
            value = self._parameters[name]
            first, last = max(start, offset), min(stop, offset + value.nbytes)
            if first < last:
                piece[first - start : last - start] = _flat(value)[first - offset : last - offset]
        return {PIECE: piece}

    def own(self) -> Source:
        """The same with arrays of its own: lent ones are overwritten."""
        return Source({name: np.array(value) for name, value in self._parameters.items()})


class Target:
    """Memory that a row is written into piece by piece. Memory that nothing was written to takes no room.

    Args:
        nbytes: Of the row.

    Raises:
        ValueError: If there is no such memory.
    """

    def __init__(self, nbytes: int) -> None:
        try:
            self._row = np.empty(nbytes, np.uint8)
        except MemoryError as error:
            raise ValueError(f"a row of bytes must fit into memory, got one of {nbytes}.") from error
        self._written: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the row."""
        return self._row.size

    @property
    def done(self) -> int:
        """Bytes that have come."""
        return sum(self._written.values())

    def write(self, start: int, piece: Array) -> None:
        """Put one piece, or several that follow each other, where they belong; one that comes again changes nothing.

        Raises:
            ValueError: If it lies outside the row.
        """
        if not 0 <= start <= start + piece.size <= self._row.size:
            raise ValueError(f"a piece must lie within {self._row.size} bytes, got {piece.size} at {start}.")
        for first, last in spans(piece.size, SIZE):  # sites that are sent the same may join other pieces
            if start + first not in self._written:
                self._row[start + first : start + last] = piece[first:last]
                self._written[start + first] = last - first

    def arrays(self, said: object) -> Parameters:
        """What the row holds, read-only and without a copy.

        Raises:
            ValueError: If it is not whole, or not what is said.
        """
        layout = layout_of(said)
        if layout.nbytes != self._row.size or self.done != self._row.size:
            raise ValueError(f"{layout.nbytes} bytes of arrays must come, got {self.done} of {self._row.size}.")
        return layout.views(self._row.data, writeable=False)


def layout_of(said: object) -> Layout:
    """Where the arrays of a row lie, from what ``Source.said`` says. Nothing is allocated.

    Raises:
        ValueError: If it is none of ours.
    """
    try:
        listed: Any = said
        if len(listed) > _MOST_ARRAYS:
            raise ValueError(f"{len(listed)} arrays")
        specs = [_spec(*entry) for entry in listed]
        if len({name for name, _, _ in specs}) != len(specs):
            raise ValueError("a name stands there twice")
        return Layout.at(specs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"arrays must be said by name, dtype and shape, got {said!r:.80}: {error}.") from error


def _spec(name: object, dtype: object, shape: Any) -> tuple[str, str, tuple[int, ...]]:
    kind, sizes = np.dtype(str(dtype)), tuple(int(size) for size in shape)
    if kind.kind not in "fiub" or min(sizes, default=0) < 0 or math.prod(sizes) >= 1 << 60:
        raise ValueError(f"{name!r} of {dtype!r} and {shape!r}")
    return str(name), kind.str, sizes


def _little(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("<")


def _flat(value: Array) -> Array:
    """The bytes of an array; a view where its memory is in order."""
    return np.ascontiguousarray(value, dtype=_little(value.dtype)).reshape(-1).view(np.uint8)
