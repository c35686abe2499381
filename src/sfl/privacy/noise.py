"""Gaussian noise that may be relied on: from a cryptographic source, on a grid.

Noise of plain floating point leaks through its low bits what it should hide (Mironov, CCS 2012). Here sum and noise are
both rounded to multiples of one power of two, far below σ, so that the low bits of what is released say nothing. That
rounding moves a sum of d coordinates by at most grid · √d, and adding up n updates in float64 by at most n² · 2^-53 of
the clip bound; `SLACK` covers both for d up to 2^38, z up to 1,000 and n up to a million.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar, final

import numpy as np

from sfl.core.task import Update
from sfl.core.transform import Stateless
from sfl.errors import ConfigError, MissingExtraError
from sfl.types import Array, Parameters

__all__ = ["GaussianNoise", "add_multiples", "add_noise", "check_sigma", "grid_of", "secret"]

_FINE = 40  # the grid is 2^-40 of σ or finer: |sum| / grid then stays an exact float64 up to 2^13 σ
_BLOCK = 1 << 16
SLACK = 2.0**-10
"""Share by which a noise multiplier is lowered in the books, for what rounding may add to a sum's sensitivity."""


def secret() -> np.random.Generator:
    """A generator of AES-128 in counter mode, keyed by the operating system; no seed leads to it.

    Raises:
        MissingExtraError: If ``randomgen`` is not installed.
    """
    try:
        source: Any = import_module("randomgen").AESCounter
    except ImportError:
        raise MissingExtraError("randomgen", "privacy") from None
    return np.random.Generator(source(key=secrets.randbits(128), counter=0))


def check_sigma(sigma: float) -> None:
    """Refuse a standard deviation whose grid float64 does not hold, before anything is spent on it.

    Raises:
        ConfigError: If it is neither 0 nor between 1e-250 and 1e250.
    """
    if not (sigma == 0.0 or 1e-250 <= sigma <= 1e250):
        raise ConfigError(
            f"sigma must be 0, or between 1e-250 and 1e250, got {sigma}. It is noise multiplier times clip bound."
        )


def grid_of(sigma: float) -> float:
    """The power of two to whose multiples noise of this standard deviation is rounded."""
    return 2.0 ** (math.floor(math.log2(sigma)) - _FINE)


def add_noise(values: Mapping[str, Array], sigma: float, generator: np.random.Generator) -> Parameters:
    """``values + N(0, σ²)`` in each coordinate, on the grid.

    Args:
        values: Real arrays; integers are noised in float64.
        sigma: Standard deviation; 0 adds nothing and rounds nothing.
        generator: From ``secret``.

    Returns:
        New arrays; of floats in their own dtype.

    Raises:
        ConfigError: If ``sigma`` is none; see ``check_sigma``.

    Edge cases: a value past 2^13 σ is rounded to what float64 has there; an empty array stays one; NaN stays NaN.
    """
    check_sigma(sigma)
    return {name: _noised(value, sigma, generator) for name, value in values.items()}


def _noised(value: Array, sigma: float, generator: np.random.Generator) -> Array:
    dtype = value.dtype if value.dtype.kind == "f" else np.dtype(np.float64)
    out = np.empty(value.shape, dtype)
    if sigma == 0.0:
        out[...] = value
        return out
    grid = grid_of(sigma)
    source, target = np.ascontiguousarray(value).reshape(-1), out.reshape(-1)
    noise = np.empty(_BLOCK)
    for start in range(0, source.size, _BLOCK):
        stop = min(start + _BLOCK, source.size)
        drawn = noise[: stop - start]
        generator.standard_normal(out=drawn)
        drawn *= sigma / grid
        np.rint(drawn, out=drawn)
        add_multiples(source[start:stop], drawn, grid, target[start:stop])
    return out


def add_multiples(value: Array, multiples: Array, grid: float, out: Array) -> None:
    """``value``, rounded to the grid, plus so many ``multiples`` of it, into ``out``; added up in float64."""
    sums = np.multiply(value, 1.0 / grid, dtype=np.float64)
    np.rint(sums, out=sums)
    sums += multiples
    np.multiply(sums, grid, out=out, casting="same_kind")


@final
@dataclass(frozen=True, slots=True)
class GaussianNoise(Stateless):
    """Adds N(0, σ²) to every coordinate of an update, or of the sum of updates.

    Its randomness is secret: nothing of the run's seed, and another draw each time, also when a round is repeated.
    """

    raises_norm: ClassVar[bool] = True
    adds_noise: ClassVar[bool] = True

    sigma: float

    def sends(self, parameters: Parameters) -> Parameters:
        """All of it, and real numbers where there were whole ones."""
        return {
            name: value if value.dtype.kind == "f" else np.zeros(value.shape, np.float64)
            for name, value in parameters.items()
        }

    def change(self, update: Update) -> Update:
        """The delta, noised; weight and metrics as they are."""
        return replace(update, delta=add_noise(update.delta, self.sigma, secret()))
