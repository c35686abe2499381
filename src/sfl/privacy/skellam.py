"""Differential privacy by noise of whole numbers that sites share out, for sums that a server sees and nothing else.

Agarwal, Kairouz and Liu, "The Skellam Mechanism for Differentially Private Federated Learning", NeurIPS 2021. Skellam
noise of variance μ is the difference of two Poisson variables of mean μ/2; the sum of sites' noise is Skellam noise of
the sum of their variances, so what a secure sum reveals has a noise that is known exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from sfl.core.mechanism import DpEvent, Mechanism, Placement
from sfl.core.task import Update
from sfl.core.transform import Stateless, Transform
from sfl.errors import ConfigError
from sfl.privacy.clip import Clip
from sfl.privacy.noise import secret
from sfl.types import Array, Parameters

__all__ = ["SkellamMechanism", "SkellamNoise"]

STEPS = 2**12
"""Whole numbers for a clip bound: Poisson draws of so large a mean are still exact to 1e-8."""
_TAIL = 12.0  # standard deviations within which a sum lies, but for one time in 1e32
SHARES = (
    "none; every site adds its share of the noise, the server sees their sum alone, no two sites pool their knowledge"
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SkellamMechanism(Mechanism):
    """Clip to C, round to the grid, add a share of Skellam noise of σ = z · C (site-level differential privacy).

    It is private only where nobody sees a single update: with secure aggregation, whose sites refuse a sum of fewer
    than ``shares``.

    Attributes:
        clip_norm: C.
        noise_multiplier: z, of the sum of ``shares`` sites, one of them left out: who knows its own share.
        shares: Sites whose noise is in every sum.
        per_layer: Clip each array on its own; see ``Clip``.
    """

    clip_norm: float
    noise_multiplier: float
    shares: int
    per_layer: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and 0.0 <= self.noise_multiplier <= 1e3):
            raise ConfigError(f"noise_multiplier must be between 0 and 1000, got {self.noise_multiplier}.")
        if self.shares < 2:
            raise ConfigError(
                f"shares must be at least 2 for noise that is shared out, got {self.shares}. Raise "
                "min_available_clients to the sites that a round must have."
            )
        Clip(self.clip_norm)

    @property
    def placement(self) -> Placement:
        """On the sites."""
        return "local"

    @property
    def on_sum(self) -> bool:
        """It protects the sum alone."""
        return True

    @property
    def least_sites(self) -> int:
        """A round of fewer sites must fail."""
        return self.shares

    @property
    def grid(self) -> float:
        """The power of two next to C / ``STEPS``, from below: whole numbers in a clip bound are that many or more."""
        return 2.0 ** math.floor(math.log2(self.clip_norm / STEPS))

    def reach(self, cohort: int) -> float:
        """See ``Mechanism.reach``."""
        spread = self.noise_multiplier * self.clip_norm * math.sqrt(cohort / (self.shares - 1))
        return cohort * self.clip_norm + _TAIL * spread

    def clip(self) -> Transform:
        """To a norm of C."""
        return Clip(self.clip_norm, self.per_layer)

    def noise(self) -> Transform:
        """A share of the noise."""
        sigma = self.noise_multiplier * self.clip_norm / math.sqrt(self.shares - 1)
        return SkellamNoise(sigma=sigma, grid=self.grid, bound=self.clip_norm)

    def event(self, cohort: int, population: int) -> DpEvent:  # noqa: ARG002
        """What one round costs: a site's data is other data, which moves the sum by up to 2C."""
        return DpEvent(
            mechanism="skellam",
            noise_multiplier=self.noise_multiplier,
            sampling_rate=1.0,
            unit="site",
            adjacency="replace_one",
            adversary="server_curious",
            sampling=SHARES,
            steps=math.floor(self.clip_norm / self.grid),
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SkellamNoise(Stateless):
    """Rounds an update to multiples of a grid, no longer than a bound, and adds Skellam noise on it.

    Each coordinate goes up or down at random so that it is right on average; should that make the update longer than
    the bound, it is shortened and rounded anew, and at last cut off towards zero, which never makes it longer.

    Attributes:
        sigma: Standard deviation of the noise.
        grid: A power of two.
        bound: The norm that a clip before it has set.
    """

    raises_norm: ClassVar[bool] = True
    adds_noise: ClassVar[bool] = True

    sigma: float
    grid: float
    bound: float

    def sends(self, parameters: Parameters) -> Parameters:
        """All of it, as real numbers: float64 holds every multiple."""
        return {name: np.broadcast_to(np.zeros(()), value.shape) for name, value in parameters.items()}

    def change(self, update: Update) -> Update:
        """The delta on the grid, noised."""
        generator = secret()
        delta = {name: np.asarray(value, np.float64) for name, value in update.delta.items()}
        whole = _rounded(delta, self.grid, self.bound, generator)
        mean = (self.sigma / self.grid) ** 2 / 2.0
        noised: Parameters = {}
        for name, value in whole.items():
            if mean:
                value += generator.poisson(mean, value.shape)
                value -= generator.poisson(mean, value.shape)
            noised[name] = value * self.grid
        return replace(update, delta=noised)


def _rounded(delta: Parameters, grid: float, bound: float, generator: np.random.Generator) -> Parameters:
    """Whole multiples of the grid whose norm is at most the bound's."""
    most, factor = bound / grid, 1.0
    for _ in range(8):
        whole = {name: _up_or_down(value * (factor / grid), generator) for name, value in delta.items()}
        norm = _norm(whole)
        if norm <= most:
            return whole
        factor *= most / norm * (1.0 - 2.0**-20)
    return {name: np.trunc(value * (min(factor, 1.0) / grid)) for name, value in delta.items()}


def _up_or_down(value: Array, generator: np.random.Generator) -> Array:
    low = np.floor(value)
    return np.asarray(low + (generator.random(value.shape) < value - low))


def _norm(whole: Parameters) -> float:
    return math.sqrt(math.fsum(float(np.vdot(value, value)) for value in whole.values()))
