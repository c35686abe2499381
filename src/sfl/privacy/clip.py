"""Clipping: the half of a mechanism that bounds what one unit can change."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from sfl.core import arrays
from sfl.core.task import Update
from sfl.core.transform import Stateless
from sfl.errors import ConfigError
from sfl.types import Array, Parameters

__all__ = ["Clip"]

_MARGIN = 1.0 - 2.0**-20  # what is scaled is scaled a little further, so that rounding cannot leave it past the bound


@final
@dataclass(frozen=True, slots=True)
class Clip(Stateless):
    """Scales an update to an L2 norm of at most ``bound``: δ · min(1, C / ‖δ‖) (McMahan et al., ICLR 2018).

    Attributes:
        bound: C, in the units of the parameters.
        per_layer: Bound each array's norm by C / √(number of arrays) instead, so that the whole stays within C (McMahan
            et al. 2018, section "per-layer clipping").

    | input | result |
    |---|---|
    | a zero delta | the same |
    | a norm below the bound | the same, bit for bit |
    | NaN or inf | NaN: a site's own check has refused it before, and the server does |
    | no arrays | the same |
    | half-precision floats | computed in float64, rounded toward the bound |
    """

    raises_norm: ClassVar[bool] = False
    clips: ClassVar[bool] = True

    bound: float
    per_layer: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bound) and self.bound > 0.0):
            raise ConfigError(f"a clip bound must be positive and finite, got {self.bound}.")

    def change(self, update: Update) -> Update:
        """The clipped delta; weight and metrics as they are."""
        if not self.per_layer:
            return replace(update, delta=_clipped(update.delta, self.bound))
        each = self.bound / math.sqrt(max(len(update.delta), 1))
        delta: Parameters = {}
        for name, value in update.delta.items():
            delta |= _clipped({name: value}, each)
        return replace(update, delta=delta)


def _clipped(delta: Parameters, bound: float) -> Parameters:
    norm = arrays.l2_norm(delta)
    if norm <= bound:
        return delta
    factor = bound / norm * _MARGIN
    with np.errstate(invalid="ignore"):  # inf becomes NaN, which no server takes
        return {name: _scaled(value, factor) for name, value in delta.items()}


def _scaled(value: Array, factor: float) -> Array:
    """``value * factor``, computed in float64 and never larger than that in its own dtype."""
    exact = np.asarray(value.astype(np.float64) * factor)  # of no dimensions it would be no array
    if value.dtype.kind != "f":
        return np.asarray(np.trunc(exact), dtype=value.dtype)
    cast = exact.astype(value.dtype)
    larger = np.abs(cast.astype(np.float64)) > np.abs(exact)
    return np.where(larger, np.nextafter(cast, np.zeros((), value.dtype)), cast).astype(value.dtype)
