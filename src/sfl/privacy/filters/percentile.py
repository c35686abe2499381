"""The percentile filter: small coordinates stay at home."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from sfl.core.task import Update
from sfl.core.transform import Stateless
from sfl.errors import ConfigError
from sfl.privacy.filters.flat import flat, kept_count, largest, refuse_not_finite, unflat
from sfl.types import Metrics

__all__ = ["PercentileFilter"]


@final
@dataclass(frozen=True, slots=True)
class PercentileFilter(Stateless):
    """Keeps the coordinates whose size is above a percentile of all, and zeroes the rest (Shokri and Shmatikov, CCS
    2015, without their noise).

    Attributes:
        percentile: K in [0, 100): the share of coordinates, in percent, that stay at home.
        gamma: Coordinates are clamped to [-γ, γ]; ``None`` leaves them.
        fixed_k: Keep exactly the largest (100 - K) % of the coordinates, whatever their sizes; else all that are
            above the percentile, so that of many equal ones all or none are kept.

    | input | result |
    |---|---|
    | a zero delta | the same |
    | NaN, inf | raises ``UpdateError`` |
    | no coordinates | the same |
    | integer arrays | treated as numbers, rounded to nearest |

    Formal guarantees: none. It is deterministic, and which coordinates are kept tells of the data, also for a fixed
    number of them. ``PrivateTopK`` is the sound variant.
    """

    raises_norm: ClassVar[bool] = False

    percentile: float
    gamma: float | None = None
    fixed_k: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.percentile < 100.0:
            raise ConfigError(f"a percentile must be in [0, 100), got {self.percentile}.")
        if self.gamma is not None and not (math.isfinite(self.gamma) and self.gamma > 0.0):
            raise ConfigError(f"gamma must be positive and finite, got {self.gamma}.")

    def change(self, update: Update) -> Update:
        """What is large enough."""
        refuse_not_finite(update)
        vector = flat(update.delta)
        if not vector.size:
            return update
        sizes = np.abs(vector)
        if self.fixed_k:
            kept = largest(sizes, kept_count(1.0 - self.percentile / 100.0, vector.size))
        else:
            kept = sizes >= np.percentile(sizes, self.percentile)
        vector[~kept] = 0.0
        if self.gamma is not None:
            np.clip(vector, -self.gamma, self.gamma, out=vector)
        return replace(update, delta=unflat(vector, update.delta))

    def figures(self, update: Update) -> Metrics:
        """The share of coordinates that were sent."""
        return {"percentile_sent_share": sent_share(update)}

    def caveat(self) -> str:
        """That it is a filter."""
        return (
            f"percentile filter ({self.percentile:g} %): adds no formal guarantee; which coordinates are kept tells of "
            "the data. --percentile-epsilon is the sound variant"
        )


def sent_share(update: Update) -> float:
    """Coordinates that are not zero, over all."""
    size = sum(value.size for value in update.delta.values())
    return sum(int(np.count_nonzero(value)) for value in update.delta.values()) / size if size else 0.0
