"""The sparse vector technique: coordinates above a threshold, found and released privately."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from sfl.core.task import Update
from sfl.core.transform import Transform
from sfl.errors import ConfigError
from sfl.privacy.filters.flat import flat, unflat
from sfl.privacy.filters.values import SELECTION_SHARE, Selection, laplace_release
from sfl.privacy.noise import secret
from sfl.types import Array, Metrics, Parameters, StateTree

__all__ = ["SparseVector", "above_threshold", "budget_shares"]

LOW_ACCEPTANCE = 0.1


def budget_shares(epsilon: float, count: int) -> tuple[float, float]:
    """ε of the threshold and of the answers, as 1 : (2c)^(2/3) (Lyu, Su and Li, PVLDB 2017, section 4.2).

    Args:
        epsilon: Of both together.
        count: c, the answers after which it halts.
    """
    weight = (2.0 * count) ** (2.0 / 3.0)
    return epsilon / (1.0 + weight), epsilon * weight / (1.0 + weight)


def above_threshold(
    queries: Array, *, threshold: float, sensitivity: float, epsilon: float, count: int, generator: np.random.Generator
) -> Array:
    """The positions of the first ``count`` queries found above a threshold (Lyu, Su and Li 2017, Algorithm 7).

    ρ ~ Lap(Δ/ε₁) is drawn once, ν ~ Lap(2cΔ/ε₂) anew for each query; qᵢ + νᵢ ≥ T + ρ is an answer, and it halts after
    c of them. What came after is never asked.

    Args:
        queries: Their true answers, each of which two neighbours move by at most ``sensitivity``, in order.
        threshold: T.
        sensitivity: Δ.
        epsilon: Of the whole search.
        count: c.
        generator: From ``noise.secret``.
    """
    first, second = budget_shares(epsilon, count)
    noisy = threshold + generator.laplace(0.0, sensitivity / first)
    answers = queries + generator.laplace(0.0, 2.0 * count * sensitivity / second, size=queries.size) >= noisy
    return np.flatnonzero(answers)[:count]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SparseVector(Selection):
    """At most c coordinates, those found above a threshold, released with Laplace noise.

    Coordinates are clamped to [-γ, γ], and asked for their sizes in an order drawn by public randomness. A third of ε
    searches (``above_threshold``, Δ = γ); two thirds release what was found: the values are paid for separately, which
    the search does not do.

    Formal guarantees: ε-differential privacy of each update for the site's data (replace one), against the server, too.

    | input | result |
    |---|---|
    | a zero delta | what noise alone finds |
    | nothing above the threshold | zeros, at the same cost |
    | NaN, inf | raises ``UpdateError`` |

    Attributes:
        epsilon: ε of each update.
        count: c.
        threshold: T, in the units of the parameters.
        gamma: γ.
    """

    name: ClassVar[str] = "sparse vector"

    count: int
    threshold: float

    def __post_init__(self) -> None:
        Selection.__post_init__(self)
        if self.count < 1:
            raise ConfigError(f"count must be at least 1, got {self.count}.")
        if not (math.isfinite(self.threshold) and self.threshold >= 0.0):
            raise ConfigError(f"threshold must be 0 or more and finite, got {self.threshold}.")

    def noise(self) -> Transform:
        """Search and release."""
        return _Search(self)


@final
@dataclass(frozen=True, slots=True)
class _Search(Transform):
    """The order is public, all noise is secret."""

    adds_noise: ClassVar[bool] = True

    mechanism: SparseVector

    def init(self, parameters: Parameters) -> StateTree:  # noqa: ARG002
        return None

    def apply(self, update: Update, state: StateTree, rng: np.random.Generator) -> tuple[Update, StateTree]:
        mechanism, generator = self.mechanism, secret()
        vector = flat(update.delta)
        order = rng.permutation(vector.size)
        found = order[
            above_threshold(
                np.abs(vector)[order],
                threshold=mechanism.threshold,
                sensitivity=mechanism.gamma,
                epsilon=mechanism.epsilon * SELECTION_SHARE,
                count=mechanism.count,
                generator=generator,
            )
        ]
        out = np.zeros(vector.size)
        left = mechanism.epsilon * (1.0 - SELECTION_SHARE)
        out[found] = laplace_release(vector[found], mechanism.count, mechanism.gamma, left, generator)
        return replace(update, delta=unflat(out, update.delta)), state

    def figures(self, update: Update) -> Metrics:
        answers = sum(int(np.count_nonzero(value)) for value in update.delta.values())
        return {"svt_acceptance_rate": answers / self.mechanism.count}

    def remarks(self, figures: Metrics) -> list[str]:
        rate = figures.get("svt_acceptance_rate", 1.0)
        if rate >= LOW_ACCEPTANCE:
            return []
        return [
            f"the sparse vector technique released {rate:.1%} of the values it paid for: the threshold of "
            f"{self.mechanism.threshold:g} is above nearly all of the updates. Lower --svt-threshold."
        ]
