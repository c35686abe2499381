"""Whole models in rows of ciphertexts: arrays end to end, across their borders, so that no slot is left empty."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfl.errors import ProtocolError
from sfl.types import Array

__all__ = [  # noqa: RUF022 - plain order
    "HEAD",
    "LAYOUT",
    "Layout",
    "PREFIX",
    "framed",
    "is_sealed",
    "parts_of",
]

HEAD, _MARKS = 4, (0.25, -0.5)
"""Numbers that stand before the arrays: the weight of an update; 1, which counts the updates of a sum; and two that
tell a sum from what another key makes of it."""
PREFIX = "ckks/"
"""Of the names of what is sealed."""
LAYOUT = f"{PREFIX}layout"
_NEAR = 0.05  # of a whole number: what decrypts to one of those is meant
_GROUP = 64  # ciphertexts that travel as one array: 2 MB as sites make them, 4 MB of sums
_WHOLE = 2.0**24  # the largest whole number; real ones are stretched so that it is where the clip is


@dataclass(frozen=True, slots=True)
class Layout:
    """Which number stands where.

    Attributes:
        names: Of all arrays of the model, in its order.
        closed: Of those that are encrypted, name, shape and dtype, in the order in which they are packed.
        slots: Numbers in a ciphertext.
        clip: The largest of them.
        units: Into how many parts the largest weight is divided; weights are whole numbers of them.
    """

    names: tuple[str, ...]
    closed: tuple[tuple[str, tuple[int, ...], str], ...]
    slots: int
    clip: float
    units: int

    @classmethod
    def of(cls, model: Mapping[str, Array], chosen: Sequence[str], slots: int, clip: float, units: int = 1) -> Layout:
        """The layout of a model of which the ``chosen`` arrays are encrypted."""
        wanted = set(chosen)
        closed = tuple((name, value.shape, value.dtype.str) for name, value in model.items() if name in wanted)
        return cls(tuple(model), closed, slots, clip, units)

    @property
    def numbers(self) -> int:
        """How many there are, with the head."""
        return HEAD + sum(math.prod(shape) for _, shape, _ in self.closed)

    def head_of(self, numbers: Array) -> tuple[float, int]:
        """Weight and count of a sum, which are whole numbers of units, and of updates.

        Raises:
            ProtocolError: If they are not: then it was decrypted with a key that it was not encrypted with.
        """
        units, count = np.rint(numbers[:2] * (self.units, 1.0)).tolist()
        meant = (units / self.units, count, *(mark * count for mark in _MARKS))
        if not (units >= 1 and count >= 1 and np.abs(numbers[:HEAD] - meant).max() < _NEAR / self.units):
            raise ProtocolError("what sites have sealed must open with their key, got one of another key.")
        return units / self.units, int(count)

    @property
    def blocks(self) -> int:
        """Arrays of ciphertexts."""
        return -(-self.numbers // (_GROUP * self.slots))

    def rows(self, block: int) -> int:
        """Ciphertexts of a block."""
        return min(-(-self.numbers // self.slots) - block * _GROUP, _GROUP)

    @property
    def block_names(self) -> list[str]:
        """Under which they travel."""
        return [f"{PREFIX}{block:05d}" for block in range(self.blocks)]

    def filled(self, block: int, weight: float, values: Callable[[str, slice], Array]) -> Array:
        """The numbers of a block.

        Args:
            block: Which.
            weight: Of the update.
            values: Part of an array, laid out flat, in float64.

        Returns:
            float64, (rows, slots); what no number takes is 0.

        Raises:
            ValueError: If a number is past the clip.
        """
        start = block * _GROUP * self.slots
        out = np.zeros(self.rows(block) * self.slots)
        for name, stretch, inner, outer in self._overlaps(start, start + out.size):
            np.multiply(values(name, inner), stretch, out=out[outer.start - start : outer.stop - start])
        if not np.abs(out).max() <= self.clip:
            raise ValueError("a number past the clip")
        if block == 0:
            out[:HEAD] = (weight, 1.0, *_MARKS)
        return out.reshape(-1, self.slots)

    def spread(self, block: int, numbers: Array, out: Callable[[str, slice, Array], object]) -> None:
        """Hand the numbers of a block to where they belong, the head left out."""
        start = block * _GROUP * self.slots
        for name, stretch, inner, outer in self._overlaps(start, start + numbers.size):
            out(name, inner, numbers[outer.start - start : outer.stop - start] / stretch)

    def _overlaps(self, low: int, high: int) -> Iterator[tuple[str, float, slice, slice]]:
        """Arrays that have numbers at [low, high): how far they are stretched, which part of them, where it stands."""
        at = HEAD
        for name, shape, dtype in self.closed:
            size = math.prod(shape)
            first, last = max(low, at), min(high, at + size)
            if first < last:
                stretch = 1.0 if np.dtype(dtype).kind == "f" else self.clip / _WHOLE
                yield name, stretch, slice(first - at, last - at), slice(first, last)
            at += size

    def packed(self) -> Array:
        """As it travels."""
        sizes = {"slots": self.slots, "clip": self.clip, "units": self.units}
        tree = {"names": self.names, "closed": self.closed, **sizes}
        return np.frombuffer(json.dumps(tree).encode(), np.uint8)

    @classmethod
    def read(cls, parameters: Mapping[str, Array]) -> Layout:
        """That of sealed parameters.

        Raises:
            ProtocolError: If it is not whole.
        """
        try:
            tree: Any = json.loads(parameters[LAYOUT].tobytes())
            closed = tuple(
                (str(name), tuple(int(n) for n in shape), np.dtype(dtype).str) for name, shape, dtype in tree["closed"]
            )
            sizes = int(tree["slots"]), float(tree["clip"]), int(tree["units"])
            return cls(tuple(map(str, tree["names"])), closed, *sizes)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a sealed model must say how it is laid out, got: {error!r}.") from error


def is_sealed(parameters: Mapping[str, Array]) -> bool:
    """Whether parameters are those of a model that sites have closed."""
    return LAYOUT in parameters


def framed(parts: Sequence[bytes]) -> Array:
    """Ciphertexts as one array of bytes: how many, how long each is, then they themselves."""
    head = np.asarray([len(parts), *map(len, parts)], "<u4").tobytes()
    return np.frombuffer(b"".join((head, *parts)), np.uint8)


def parts_of(array: Array, count: int) -> Iterator[bytes]:
    """What ``framed`` made of ``count`` ciphertexts, one by one.

    Raises:
        ProtocolError: If it did not make this.
    """
    start, flat = 4 * (count + 1), np.ascontiguousarray(array).reshape(-1)
    head = np.frombuffer(flat[:start].tobytes(), "<u4") if flat.dtype == np.uint8 and flat.size >= start else None
    if head is None or int(head[0]) != count or start + int(head[1:].sum(dtype=np.int64)) != flat.size:
        raise ProtocolError(f"an array of ciphertexts must hold {count} of them, got {flat.nbytes} other bytes.")
    for length in head[1:].tolist():
        yield flat[start : start + length].tobytes()
        start += length
