"""Differential privacy by Gaussian noise: its calibration, and the mechanism that a recipe is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

from sfl.core.mechanism import DpEvent, Mechanism, Placement
from sfl.core.transform import Transform
from sfl.errors import ConfigError
from sfl.privacy.accountant import Method, PrivacyAccountant
from sfl.privacy.clip import Clip
from sfl.privacy.noise import SLACK, GaussianNoise, check_sigma

__all__ = ["GaussianMechanism", "analytic_gaussian_delta", "calibrate_gaussian_sigma", "calibrate_noise_multiplier"]

_PRECISION = 1e-12
_CLOSE = 1e-3  # relative, of a noise multiplier that is looked for
_STRAIGHT = 12  # straight lines before halving takes over: what is spent may be known to two digits alone
_LEAP, _FAR, _LEAST = 2.0, 3.0, math.log(1e-9)  # logarithms: the widest step, what is past all measure, the least noise
POISSON = "each site is drawn by itself, by secret randomness, in every round (Poisson sampling)"
ALL = "none"
SHARES = "none; every site adds its share of the noise, and no two of them pool what they know"
Where: TypeAlias = Literal["central", "local", "distributed"]


def analytic_gaussian_delta(sigma: float, epsilon: float, sensitivity: float = 1.0) -> float:
    """δ of the Gaussian mechanism at ε, exactly (Balle and Wang, ICML 2018, Theorem 8).

    δ(ε) = Φ(Δ/2σ − εσ/Δ) − e^ε Φ(−Δ/2σ − εσ/Δ).
    """
    half, product = sensitivity / (2.0 * sigma), epsilon * sigma / sensitivity
    return _normal(half - product) - math.exp(epsilon + _log_normal(-half - product))


def calibrate_gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """The smallest σ with which one release of N(0, σ²) is (ε, δ)-private (Balle and Wang 2018, Algorithm 1).

    Args:
        epsilon: ε > 0.
        delta: δ in (0, 1).
        sensitivity: Δ > 0, the L2 distance of neighbours.

    Raises:
        ConfigError: If one of them is out of its range.

    Example:
        >>> round(calibrate_gaussian_sigma(1.0, 1e-5), 6)
        3.730632
    """
    if not (epsilon > 0.0 and 0.0 < delta < 1.0 and sensitivity > 0.0 and math.isfinite(epsilon * sensitivity)):
        raise ConfigError(
            f"epsilon and sensitivity must be positive and delta in (0, 1), got {epsilon}, {sensitivity}, {delta}."
        )
    return sensitivity * _smallest(lambda sigma: analytic_gaussian_delta(sigma, epsilon) <= delta)


def calibrate_noise_multiplier(
    epsilon: float, event: Callable[[float], DpEvent], *, delta: float, method: Method = "pld"
) -> float:
    """The smallest noise multiplier, to three digits, with which events of this kind stay within ε.

    Args:
        epsilon: The budget, ε > 0.
        event: What a whole run costs at a noise multiplier; its ``count`` says how often.
        delta: δ.
        method: The accountant's.

    Raises:
        ConfigError: If ε is not positive.
    """
    if not (epsilon > 0.0 and math.isfinite(epsilon)):
        raise ConfigError(f"epsilon must be positive and finite, got {epsilon}.")
    accountant = PrivacyAccountant(delta=delta, method=method)
    return _smallest_noise(lambda noise: accountant.epsilon([event(noise)]), epsilon)


def _smallest_noise(spent: Callable[[float], float], epsilon: float) -> float:
    """The smallest noise with which no more than ε is spent, from above, to a relative ``_CLOSE``.

    What is spent falls as the noise rises, nearly as a power of it: straight lines between logarithms find it in half
    as many steps as halving would, and each step may take the accountant a second.
    """
    low = high = None  # (log noise, log of what is spent over ε): too little noise, and enough
    at, steps = 0.0, 0
    while low is None or high is None or high[0] - low[0] > _CLOSE:
        got = spent(math.exp(at))
        point = (at, math.log(got / epsilon) if 0.0 < got < math.inf else math.copysign(_FAR, got - epsilon))
        low, high = (point, high) if got > epsilon else (low, point)
        if low is None or high is None:
            at += max(-_LEAP, min(_LEAP, point[1])) or -_CLOSE  # as if ε were the inverse of the noise
            if at < _LEAST:
                return math.exp(point[0])
            continue
        steps += 1
        if steps > _STRAIGHT:
            at = (low[0] + high[0]) / 2.0
            continue
        slope = (high[1] - low[1]) / (high[0] - low[0])
        guess = low[0] - low[1] / slope if slope < 0.0 else (low[0] + high[0]) / 2.0
        side = _CLOSE / 3.0 if got > epsilon else -_CLOSE / 3.0  # to the other side of it, so that both ends come close
        at = min(max(guess + side, low[0] + _CLOSE / 3.0), high[0] - _CLOSE / 3.0)
    return math.exp(high[0])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianMechanism(Mechanism):
    """Clip to C, then Gaussian noise of σ = z · C (site-level differential privacy).

    *Central* (McMahan et al., ICLR 2018): sites clip, the server adds the noise to the sum and divides by the planned
    number of sites, which it must be trusted to do. *Local*: each site noises its own release, the server need not be
    trusted, and the noise of n sites adds up. *Distributed*: each site adds a share of the noise, small by itself; in
    the sum of ``shares`` sites or more it is what central noise is, also for one of them, who knows its own share.
    Without a site its share is missing, too, so what is hidden is its data and not whether it took part.

    Attributes:
        clip_norm: C.
        noise_multiplier: z.
        where: ``"central"``, ``"local"`` or ``"distributed"``.
        per_layer: Clip each array on its own; see ``Clip``.
        sampling_rate: The probability with which a site is drawn in a round, in secret; 1.0 claims nothing of it.
        shares: Sites whose noise is in every sum, if it is distributed; a round with fewer must fail.
    """

    clip_norm: float
    noise_multiplier: float
    where: Where = "central"
    per_layer: bool = False
    sampling_rate: float = 1.0
    shares: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0.0):
            raise ConfigError(f"noise_multiplier must be finite and 0 or more, got {self.noise_multiplier}.")
        if not 0.0 < self.sampling_rate <= 1.0:
            raise ConfigError(f"sampling_rate must be in (0, 1], got {self.sampling_rate}.")
        if self.where != "central" and self.sampling_rate < 1.0:
            raise ConfigError(
                f"sampling_rate must be 1 for {self.where} noise, got {self.sampling_rate}. "
                "Ask for no amplification, or for central noise."
            )
        if (self.where == "distributed") != (self.shares >= 2):
            raise ConfigError(
                f"shares must be at least 2 for distributed noise and left out otherwise, got {self.shares} for "
                f"{self.where}. Raise min_available_clients to the sites that a round must have."
            )
        Clip(self.clip_norm)
        check_sigma(self.noise_multiplier * self.clip_norm)

    @property
    def placement(self) -> Placement:
        """Where the noise half runs."""
        return "central" if self.where == "central" else "local"

    @property
    def on_sum(self) -> bool:
        """All but local noise protects the sum alone."""
        return self.where != "local"

    @property
    def least_sites(self) -> int:
        """A round of fewer sites must fail."""
        return self.shares

    def clip(self) -> Transform:
        """To a norm of C."""
        return Clip(self.clip_norm, self.per_layer)

    def noise(self) -> Transform:
        """N(0, (zC)²), or a share of it."""
        others = max(self.shares - 1, 1)
        return GaussianNoise(self.noise_multiplier * self.clip_norm / math.sqrt(others))

    def event(self, cohort: int, population: int) -> DpEvent:  # noqa: ARG002 - the sample is random, its rate is not
        """What one round costs.

        Central: a site is there or not. Local and distributed: a site's data is other data, which moves its release by
        up to 2C, which the accountant knows.
        """
        sampled = POISSON if self.sampling_rate < 1.0 else ALL
        return DpEvent(
            mechanism="gaussian",
            noise_multiplier=self.noise_multiplier * (1.0 - SLACK),
            sampling_rate=self.sampling_rate,
            unit="site",
            adjacency="add_remove" if self.where == "central" else "replace_one",
            adversary="server_curious" if self.where == "local" else "server_trusted",
            sampling=SHARES if self.where == "distributed" else sampled,
        )


def _smallest(fits: Callable[[float], bool], precision: float = _PRECISION) -> float:
    """The smallest positive number that fits, from above, to a relative ``precision``; larger ones must fit, too."""
    high = 1.0
    while not fits(high):
        high *= 2.0
    low = high / 2.0
    while low > 1e-9 and fits(low):
        high, low = low, low / 2.0
    while high - low > precision * high:
        middle = (low + high) / 2.0
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _normal(x: float) -> float:
    return math.erfc(-x / math.sqrt(2.0)) / 2.0


def _log_normal(x: float) -> float:
    """log Φ(x), also where Φ(x) is below the smallest float."""
    if x > -30.0:
        return math.log(_normal(x))
    square = x * x  # the asymptotic series of Mills' ratio; at -30 its next term is 1e-8 of the last
    return -square / 2.0 - math.log(-x) - math.log(2.0 * math.pi) / 2.0 + math.log1p(-1.0 / square + 3.0 / square**2)
