"""Canaries' directions: one for each, orthogonal to all others, spread over the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sfl.core import rng
from sfl.errors import ConfigError
from sfl.types import Array, Parameters

__all__ = ["Directions"]


@dataclass(frozen=True, kw_only=True)
class Directions:
    """``count`` orthogonal unit vectors in the space of a model's parameters.

    Counted through all arrays, coordinate j belongs to direction j modulo ``count``, with a random sign; a direction
    is ±1/√k on its k coordinates. So no canary disturbs another one's figure, and all figures together cost one pass
    over the model.

    Attributes:
        count: How many.
        names: The arrays that they lie in, in order.
        seed: Of the signs.
    """

    count: int
    names: tuple[str, ...]
    seed: int

    @classmethod
    def within(cls, parameters: Parameters, count: int, seed: int) -> Directions:
        """In all arrays of floats.

        Raises:
            ConfigError: If there are fewer coordinates than directions.
        """
        names = tuple(name for name, value in parameters.items() if value.dtype.kind == "f")
        size = sum(parameters[name].size for name in names)
        if not 1 <= count <= size:
            raise ConfigError(
                f"canaries must be between 1 and the number of parameters that are floats, {size}, got {count}."
            )
        return cls(count=count, names=names, seed=seed)

    def add(self, base: Parameters, index: int, length: float) -> Parameters:
        """``base`` plus ``length`` times direction ``index``, as new arrays."""
        scale = length / np.sqrt(len(range(index, self._size(base), self.count)))
        moved = {name: np.array(value) for name, value in base.items()}
        for name, start, signs in self._parts(base):
            flat, first = moved[name].reshape(-1), (index - start) % self.count
            flat[first :: self.count] += (signs[first :: self.count] * scale).astype(flat.dtype)
        return moved

    def copy_into(self, target: Parameters, values: Parameters, index: int) -> None:
        """Put ``values`` on the coordinates of direction ``index`` into ``target``, which keeps its others."""
        for name, start, _ in self._parts(values):
            first = (index - start) % self.count
            target[name].reshape(-1)[first :: self.count] = values[name].reshape(-1)[first :: self.count]

    def along(self, values: Parameters, index: int) -> float:
        """⟨values, direction⟩ for one direction."""
        total = 0.0
        for name, start, signs in self._parts(values):
            first = (index - start) % self.count
            own = values[name].reshape(-1)[first :: self.count]
            total += float(np.dot(own.astype(np.float64), signs[first :: self.count].astype(np.float64)))
        return total / float(np.sqrt(len(range(index, self._size(values), self.count))))

    def project(self, values: Parameters) -> Array:
        """⟨values, direction⟩ for each direction; shape (count,), in float64."""
        total = np.zeros(self.count)
        for name, start, signs in self._parts(values):
            products = values[name].reshape(-1) * signs.astype(np.float64)
            padded = np.zeros(-(-products.size // self.count) * self.count)
            padded[: products.size] = products
            total += np.roll(padded.reshape(-1, self.count).sum(axis=0), start)
        size = self._size(values)
        lengths = np.array([len(range(index, size, self.count)) for index in range(self.count)])
        return total / np.sqrt(lengths)

    def _size(self, values: Parameters) -> int:
        return sum(values[name].size for name in self.names)

    def _parts(self, values: Parameters) -> list[tuple[str, int, Array]]:
        """Each array with where it begins and its signs."""
        signs = _signs(self.seed, self._size(values))
        parts: list[tuple[str, int, Array]] = []
        start = 0
        for name in self.names:
            parts.append((name, start, signs[start : start + values[name].size]))
            start += values[name].size
        return parts


@lru_cache(maxsize=2)
def _signs(seed: int, size: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    bits = rng.public(seed, 0, "audit-signs").integers(0, 2, size, dtype=np.int8)
    return bits * np.int8(2) - np.int8(1)
