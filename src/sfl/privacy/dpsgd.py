"""Example-level differential privacy of local training (DP-SGD): its samples, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sfl.core.mechanism import DpEvent
from sfl.errors import ConfigError
from sfl.privacy.accountant import Method
from sfl.privacy.dp import calibrate_noise_multiplier
from sfl.privacy.noise import SLACK

__all__ = ["calibrate_dpsgd", "dpsgd_event", "poisson_batches"]

Indices = NDArray[np.int64]
SAMPLING = (
    "each example is drawn by itself, by the site's secret randomness, in every step (Poisson sampling); "
    "how many examples the site has is taken to be public"
)
ALL = "none: every example is in every step; how many examples the site has is taken to be public"


def dpsgd_event(noise_multiplier: float, sampling_rate: float, steps: int) -> DpEvent:
    """What ``steps`` steps of DP-SGD on one site cost each of its examples (Abadi et al., CCS 2016).

    The noise is added on the site, so the guarantee holds against the server, too. It is the site's own: examples of
    other sites are not concerned.

    Args:
        noise_multiplier: z, σ of the noise on a step's sum over the most that one example moves it.
        sampling_rate: q in (0, 1], the probability with which an example is in a step.
        steps: Noisy steps, 1 or more; all that are taken, whatever was drawn.

    Raises:
        ConfigError: If one of them is out of its range.

    Edge cases: a noise multiplier of 0 gives an event without any guarantee (ε = ∞); a rate of 1 claims no
    amplification.

    Example:
        >>> from sfl.privacy.accountant import PrivacyAccountant
        >>> round(PrivacyAccountant(delta=1e-5).epsilon([dpsgd_event(4.0, 0.01, 10_000)]), 2)
        0.95
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0.0):
        raise ConfigError(f"noise_multiplier must be finite and 0 or more, got {noise_multiplier}.")
    _check_rate(sampling_rate)
    if steps < 1:
        raise ConfigError(f"steps must be 1 or more, got {steps}.")
    return DpEvent(
        mechanism="dp-sgd",
        noise_multiplier=noise_multiplier * (1.0 - SLACK),
        sampling_rate=sampling_rate,
        unit="example",
        adjacency="add_remove",
        adversary="server_curious",
        sampling=SAMPLING if sampling_rate < 1.0 else ALL,
        count=steps,
    )


def calibrate_dpsgd(epsilon: float, *, delta: float, sampling_rate: float, steps: int, method: Method = "pld") -> float:
    """The smallest noise multiplier, to three digits, with which a whole run stays within ε for each example.

    Args:
        epsilon: The budget, ε > 0.
        delta: δ.
        sampling_rate: q, the same in every step.
        steps: Steps of all rounds together: rounds that the site takes part in, times its steps in each.
        method: The accountant's.

    Raises:
        ConfigError: If one of them is out of its range.
    """
    return calibrate_noise_multiplier(
        epsilon, lambda noise: dpsgd_event(noise, sampling_rate, steps), delta=delta, method=method
    )


def poisson_batches(
    count: int,
    rate: float,
    steps: int,
    physical: int,
    generator: np.random.Generator,
    *,
    lengths: Indices | None = None,
) -> Iterator[list[Indices]]:
    """So many Poisson samples of a data set, each in physical batches.

    Args:
        count: Examples in the data set.
        rate: q, the probability with which each example is in a sample, independently of all else.
        steps: How many samples.
        physical: Most examples in a physical batch.
        generator: From ``sfl.privacy.noise.secret``: amplification counts on nobody knowing who was drawn.
        lengths: Length of each example, shape (count,); those of like length then share a physical batch. What a sample
            holds does not depend on it.

    Yields:
        Indices of each physical batch, int64; an empty list for an empty sample.

    Raises:
        ConfigError: If ``rate`` is not in (0, 1] or ``physical`` is below 1.
    """
    _check_rate(rate)
    if physical < 1:
        raise ConfigError(f"physical must be 1 example or more, got {physical}.")
    for _ in range(steps):
        drawn = np.flatnonzero(generator.random(count) < rate)
        if lengths is not None:
            drawn = drawn[np.argsort(lengths[drawn], kind="stable")]
        yield [drawn[start : start + physical] for start in range(0, len(drawn), physical)]


def _check_rate(rate: float) -> None:
    if not 0.0 < rate <= 1.0:
        raise ConfigError(f"sampling_rate must be in (0, 1], got {rate}.")
