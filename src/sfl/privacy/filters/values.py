"""What both private selections share: clamped coordinates, and chosen values released with Laplace noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from sfl.core.mechanism import DpEvent, Mechanism, Placement
from sfl.core.task import Update
from sfl.core.transform import Stateless, Transform
from sfl.errors import ConfigError
from sfl.privacy.filters.flat import refuse_not_finite
from sfl.privacy.noise import SLACK, add_multiples, grid_of
from sfl.types import Array

__all__ = ["Clamp", "Selection", "laplace_release"]

SELECTION_SHARE = 1.0 / 3.0
"""Of a selection's ε, what choosing the coordinates costs; the rest is for their values."""


@final
@dataclass(frozen=True, slots=True)
class Clamp(Stateless):
    """Clamps each coordinate to [-γ, γ], so that another site's data moves none by more than 2γ."""

    raises_norm: ClassVar[bool] = False
    clips: ClassVar[bool] = True

    gamma: float

    def change(self, update: Update) -> Update:
        """The clamped delta."""
        refuse_not_finite(update)
        return replace(update, delta={name: _clamped(value, self.gamma) for name, value in update.delta.items()})


def _clamped(value: Array, gamma: float) -> Array:
    """Within γ also after rounding to the array's own dtype."""
    if value.dtype.kind != "f":
        return np.asarray(np.trunc(np.clip(value, -gamma, gamma)), dtype=value.dtype)
    with np.errstate(over="ignore"):
        bound = np.asarray(gamma, value.dtype)
    bound = np.nextafter(bound, np.zeros_like(bound)) if float(bound) > gamma else bound
    return np.asarray(np.clip(value, -bound, bound))


def laplace_release(values: Array, count: int, gamma: float, epsilon: float, generator: np.random.Generator) -> Array:
    """``values`` with Laplace noise: ε-private if at most ``count`` of them are released, each in [-γ, γ].

    Two data sets move the released values by at most 2γ · ``count`` in L1 norm, so the scale is that over ε (Dwork et
    al. 2006); the grid's rounding is covered by ``SLACK``.
    """
    scale = 2.0 * gamma * count / epsilon * (1.0 + SLACK)
    grid = grid_of(scale)
    multiples = np.rint(generator.laplace(0.0, scale / grid, size=values.size))
    out = np.empty(values.size)
    add_multiples(values, multiples, grid, out)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection(Mechanism):
    """What every private selection of a site's own is: clamped coordinates, an ε of each update, no assumption.

    Attributes:
        epsilon: ε of each update.
        gamma: γ, the largest size of a coordinate.
    """

    name: ClassVar[str]

    epsilon: float
    gamma: float

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("gamma", self.gamma)):
            if not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"{name} must be positive and finite, got {value}.")

    @property
    def placement(self) -> Placement:
        """On the site."""
        return "local"

    def clip(self) -> Transform:
        """Each coordinate to [-γ, γ]."""
        return Clamp(self.gamma)

    def event(self, cohort: int, population: int) -> DpEvent:  # noqa: ARG002 - what a site releases is its own
        """ε, for what the data of each site that takes part are, whoever sees it."""
        return DpEvent(
            mechanism=self.name,
            noise_multiplier=0.0,
            sampling_rate=1.0,
            unit="site",
            adjacency="replace_one",
            adversary="server_curious",
            sampling="none",
            epsilon=self.epsilon,
        )
