"""From what an adversary sees in each round to one score for each canary."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sfl.core.mechanism import Mechanism
from sfl.privacy.correlated import BandedMechanism, coefficients
from sfl.types import Array

__all__ = ["Scoring"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How figures of many rounds become one. It uses what is public of the mechanism, and never a coin.

    Attributes:
        weights: First column of the factor C of correlated noise; (1,) if noise is drawn anew in each round.
        turns: Canary i takes part in the rounds t (from 0) at which t − i is a multiple of it; 1 is every round.
        sampling_rate: Probability with which a canary was drawn in a round, in secret.
        noise_multiplier: z of the claim: how far a canary that was drawn should stand out, in standard deviations, is
            its inverse.
    """

    weights: tuple[float, ...] = (1.0,)
    turns: int = 1
    sampling_rate: float = 1.0
    noise_multiplier: float = 0.0

    @classmethod
    def of(cls, mechanism: Mechanism, turns: int = 1) -> Scoring:
        """For what is seen under this mechanism."""
        event = mechanism.event(1, 1)
        weights = coefficients(mechanism.bands) if isinstance(mechanism, BandedMechanism) else [1.0]
        return cls(
            weights=tuple(weights),
            turns=turns,
            sampling_rate=event.sampling_rate,
            noise_multiplier=event.noise_multiplier,
        )

    @property
    def heads_only(self) -> bool:
        """Whether only canaries that are in are worth a guess: of those that were never drawn nothing is seen."""
        return self.sampling_rate < 1.0

    def scores(self, seen: Array) -> Array:
        """One score for each canary.

        Correlated noise C⁻¹Z is made white again by C, and each canary is then looked for with the weights that C gave
        it. Rounds count by the inverse of how much their figures vary, so that a clip bound that moves, and noise with
        it, needs no scale. Under Poisson sampling a round adds log(1 − q + q · e^(x/z − 1/2z²)), which says how much
        likelier x is with the canary among those who may have been drawn.

        Args:
            seen: ⟨release, direction⟩ by round and canary, shape (rounds, canaries).
        """
        white = np.zeros_like(seen, dtype=np.float64)
        for lag, weight in enumerate(self.weights):
            white[lag:] += weight * seen[: len(seen) - lag]
        spread = np.sqrt(np.mean(white**2, axis=1, keepdims=True))
        white = white / np.where(spread > 0.0, spread, 1.0)
        if self.sampling_rate >= 1.0 or self.noise_multiplier <= 0.0:
            return (white * self._expected(*seen.shape)).sum(axis=0)
        stands_out = 1.0 / self.noise_multiplier
        ratio = white * stands_out - stands_out**2 / 2.0
        rate = self.sampling_rate
        return np.logaddexp(math.log1p(-rate), math.log(rate) + ratio).sum(axis=0)

    def _expected(self, rounds: int, canaries: int) -> Array:
        """How much of each canary there should be in each round."""
        since = np.arange(rounds)[:, None] - np.arange(canaries)[None, :]
        lag = since % self.turns
        began = np.arange(rounds)[:, None] >= np.arange(canaries)[None, :] % self.turns
        padded = np.zeros(max(self.turns, len(self.weights)))
        padded[: len(self.weights)] = self.weights
        return padded[lag] * began
