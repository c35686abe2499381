"""Amplification by shuffling: what local noise is worth when nobody can tell who sent which update.

It rests on a shuffler that SFL does not provide: an anonymous channel between sites and server. Without one, only the
local guarantee holds. There is no gain before there are hundreds of sites.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any, final

import numpy as np

from sfl.core.mechanism import DpEvent, Mechanism, Placement
from sfl.core.transform import Transform
from sfl.errors import ConfigError, MissingExtraError
from sfl.privacy.dp import GaussianMechanism, analytic_gaussian_delta

__all__ = ["ShuffledGaussian", "shuffled_delta", "shuffled_epsilon", "shuffled_gaussian_epsilon"]

SHUFFLER = (
    "none; it is ASSUMED that a shuffler outside SFL hides from the server who sent which update, of {n} sites or more"
)

_PRECISION = 1e-6


def shuffled_delta(epsilon: float, local_epsilon: float, n: int) -> float:
    """δ at ε of n shuffled ε₀-private releases, from above (Feldman, McMillan and Talwar, FOCS 2021, Theorem 3.1).

    Neighbours differ in one site's data. They are dominated by (A + Δ, C − A + 1 − Δ) against (A + 1 − Δ, C − A + Δ)
    with C ~ Bin(n − 1, e^−ε₀), A ~ Bin(C, 1/2) and Δ ~ Bern(e^ε₀ / (e^ε₀ + 1)); given C, their likelihood ratio rises
    with the first count, so that the hockey-stick divergence is a difference of two binomial tails.

    Args:
        epsilon: ε, 0 or more.
        local_epsilon: ε₀ of each release by itself.
        n: How many are shuffled.

    Raises:
        ConfigError: If one of them is out of its range.
        MissingExtraError: If ``scipy`` is not installed.
    """
    if not (epsilon >= 0.0 and 0.0 < local_epsilon < math.inf and n >= 1):
        raise ConfigError(
            f"epsilon must be 0 or more, local_epsilon positive and n at least 1, got {epsilon}, {local_epsilon}, {n}."
        )
    if epsilon >= local_epsilon:
        return 0.0
    binomial = _binomial()
    clones, likely = math.exp(-local_epsilon), 1.0 / (1.0 + math.exp(-local_epsilon))
    low, high = binomial.ppf([1e-16, 1.0 - 1e-16], n - 1, clones)
    counts = np.arange(int(low), int(high) + 1, dtype=np.float64)
    weights = binomial.pmf(counts, n - 1, clones)
    odds = _odds(epsilon, likely)
    first = np.floor(odds * (counts + 1.0) / (1.0 + odds)) + 1.0  # the smallest count whose ratio is above e^ε
    without, with_one = binomial.sf(first - 1.0, counts, 0.5), binomial.sf(first - 2.0, counts, 0.5)
    left = likely * with_one + (1.0 - likely) * without
    right = (1.0 - likely) * with_one + likely * without
    divergence = np.maximum(left - math.exp(epsilon) * right, 0.0)
    return float(weights @ divergence + max(0.0, 1.0 - float(weights.sum())))


def shuffled_epsilon(local_epsilon: float, n: int, delta: float) -> float:
    """ε of n shuffled ε₀-private releases at δ, from above; never more than ε₀.

    Example:
        >>> 0.1675 < shuffled_epsilon(4.0, 100_000, 1e-6) < 0.1728
        True
    """
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta must be in (0, 1), got {delta}.")
    low, high = 0.0, local_epsilon
    while high - low > _PRECISION * local_epsilon:
        middle = (low + high) / 2.0
        if shuffled_delta(middle, local_epsilon, n) <= delta:
            high = middle
        else:
            low = middle
    return high


def shuffled_gaussian_epsilon(noise_multiplier: float, n: int, delta: float) -> float:
    """ε at δ of n shuffled releases with Gaussian noise of their own; infinite if shuffling brings nothing.

    A release is (ε₀, δ₀)-private: its sensitivity is twice the clip bound. Shuffled, n of them are private at (ε, δ₁ +
    (e^ε + 1)(1 + e^−ε₀ / 2) n δ₀) by Feldman, McMillan and Talwar 2021, Theorem 3.8; half of δ goes to each term.

    Args:
        noise_multiplier: σ of a site's noise over the clip bound.
        n: How many sites' releases are shuffled; those that fail do not count.
        delta: δ of the whole.
    """
    if noise_multiplier <= 0.0:
        return math.inf
    best = math.inf
    for local in np.geomspace(0.05, 20.0, 60).tolist():
        epsilon = shuffled_epsilon(local, n, delta / 2.0)
        excess = (math.exp(epsilon) + 1.0) * (1.0 + math.exp(-local) / 2.0) * n
        if analytic_gaussian_delta(noise_multiplier, local, 2.0) * excess <= delta / 2.0:
            best = min(best, epsilon)
    return best


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ShuffledGaussian(Mechanism):
    """Local Gaussian noise, counted as if a shuffler stood between sites and server.

    Where shuffling brings nothing, as with fewer than hundreds of sites, the local guarantee is what is counted.

    Attributes:
        local: The noise.
        shuffled: Updates that every round has at least.
        delta: δ that all rounds may use up for it together; what remains of the budget's is the accountant's.
        rounds: Rounds that a site takes part in.
    """

    local: GaussianMechanism
    shuffled: int
    delta: float
    rounds: int

    def __post_init__(self) -> None:
        if self.local.where != "local":
            raise ConfigError(f"shuffled noise must be local, got {self.local.where}. Use where='local'.")

    @property
    def placement(self) -> Placement:
        """On the sites."""
        return "local"

    @property
    def least_sites(self) -> int:
        """A round of fewer is not shuffled enough."""
        return self.shuffled

    def clip(self) -> Transform:
        """The local mechanism's."""
        return self.local.clip()

    def noise(self) -> Transform:
        """The local mechanism's."""
        return self.local.noise()

    def event(self, cohort: int, population: int) -> DpEvent:
        """One round, shuffled, or the local event if that costs less."""
        plain = self.local.event(cohort, population)
        each = self.delta / self.rounds
        epsilon = _cached(plain.noise_multiplier, self.shuffled, each)
        if math.isinf(epsilon) or analytic_gaussian_delta(plain.noise_multiplier, epsilon, 2.0) <= each:
            return plain
        return replace(
            plain,
            mechanism="gaussian, shuffled",
            noise_multiplier=0.0,
            epsilon=epsilon,
            delta=each,
            sampling=SHUFFLER.format(n=self.shuffled),
        )


@lru_cache(maxsize=64)
def _cached(noise_multiplier: float, n: int, delta: float) -> float:
    return shuffled_gaussian_epsilon(noise_multiplier, n, delta)


def _odds(epsilon: float, likely: float) -> float:
    """k / (C − k + 1) at which (likely · odds + 1 − likely) / ((1 − likely) · odds + likely) is e^ε."""
    bound = math.exp(epsilon)
    return (bound * likely - (1.0 - likely)) / (likely - bound * (1.0 - likely))


def _binomial() -> Any:
    try:
        return import_module("scipy.stats").binom
    except ImportError:
        raise MissingExtraError("scipy", "privacy") from None
