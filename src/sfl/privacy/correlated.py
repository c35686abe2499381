"""Noise that is correlated over the rounds, so that much of it cancels in the model (DP-FTRL by matrix factorisation).

The model after t rounds holds the sum of t noisy updates. With the prefix sums A = B C (Denisov, McMahan, Rush, Smith
and Thakurta, NeurIPS 2022), the releases get the noise C⁻¹ Z instead of Z: C X + Z is private, and what is released
follows from it. C is lower triangular, Toeplitz and zero past its first ``bands`` diagonals, which are those of the
square root of A (Kalinin and Lampert, NeurIPS 2024, "banded square root"): the noise of a round needs that of the
``bands`` − 1 before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast, final

import numpy as np

from sfl.core.mechanism import DpEvent, Mechanism, Placement
from sfl.core.task import Update
from sfl.core.transform import Transform
from sfl.errors import ConfigError
from sfl.privacy.clip import Clip
from sfl.privacy.dp import GaussianMechanism
from sfl.privacy.noise import add_multiples, grid_of, secret
from sfl.types import Parameters, StateTree

__all__ = ["BandedMechanism", "CorrelatedNoise", "coefficients"]


def coefficients(bands: int) -> list[float]:
    """The first column of C: c_j = binom(2j, j) / 4^j for j below ``bands``, the series of (1 − x)^(−1/2).

    Example:
        >>> coefficients(4)
        [1.0, 0.5, 0.375, 0.3125]
    """
    if bands < 1:
        raise ConfigError(f"bands must be at least 1, got {bands}.")
    found = [1.0]
    for j in range(1, bands):
        found.append(found[-1] * (2 * j - 1) / (2 * j))
    return found


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BandedMechanism(Mechanism):
    """Clip to C, then banded correlated noise on the sum; central, and with turns instead of chance.

    A site may take part at most once in any ``bands`` rounds: the columns of C of its rounds then do not overlap
    (Choquette-Choo et al., NeurIPS 2023, "(Amplified) banded matrix factorization", section 3), also when updates
    depend on earlier releases. Each of its turns costs one Gaussian of ``noise_multiplier``; nothing is assumed of
    sampling.

    Attributes:
        clip_norm: C.
        noise_multiplier: z: the white noise has σ = z · C · ‖c‖, c the column of the factor.
        bands: Rounds over which noise cancels; 1 is plain Gaussian noise.
        per_layer: See ``Clip``.
    """

    clip_norm: float
    noise_multiplier: float
    bands: int
    per_layer: bool = False

    def __post_init__(self) -> None:
        coefficients(self.bands)
        self._plain()

    def _plain(self) -> GaussianMechanism:
        return GaussianMechanism(
            clip_norm=self.clip_norm, noise_multiplier=self.noise_multiplier, per_layer=self.per_layer
        )

    @property
    def placement(self) -> Placement:
        """On the server."""
        return "central"

    @property
    def rounds_apart(self) -> int:
        """A site's turns must be at least this many rounds apart."""
        return self.bands

    def clip(self) -> Transform:
        """To a norm of C."""
        return Clip(self.clip_norm, self.per_layer)

    def noise(self) -> Transform:
        """Of the whole run; it remembers the last rounds'."""
        norm = math.sqrt(sum(c * c for c in coefficients(self.bands)))
        return CorrelatedNoise(self.noise_multiplier * self.clip_norm * norm, self.bands)

    def event(self, cohort: int, population: int) -> DpEvent:
        """One turn of a site.

        A round that is repeated after a crash draws new noise on top of the same past. It is one more release of at
        least this noise for those whose turn it is, and a second look at those of the ``bands`` − 1 turns before: each
        is moved by no more than ‖c‖ in it. So it is charged once more, to all.
        """
        return replace(self._plain().event(cohort, population), mechanism="banded matrix factorisation")


@final
@dataclass(frozen=True, slots=True)
class CorrelatedNoise(Transform):
    """Adds (C⁻¹ Z)_t = Z_t − Σ_{j=1}^{b−1} c_j (C⁻¹ Z)_{t−j}; its state is the past, as multiples of the grid.

    What a turn costs counts on the noise of the rounds that follow, so σ and bands stay what they were.

    | input | result |
    |---|---|
    | σ = 0 | unchanged |
    | the first rounds | fewer terms: there is no past |
    | an empty array | stays one |
    """

    adds_noise: ClassVar[bool] = True

    sigma: float
    bands: int

    def init(self, parameters: Parameters) -> StateTree:  # noqa: ARG002
        """No past."""
        return {"sigma": self.sigma, "bands": self.bands, "past": []}

    def apply(
        self,
        update: Update,
        state: StateTree,
        rng: np.random.Generator,  # noqa: ARG002
    ) -> tuple[Update, StateTree]:
        """The noised sum, and the noise to remember, newest first.

        Raises:
            ConfigError: If the run began with another σ or other bands.
        """
        kept = cast("dict[str, Any]", state)
        if (kept["sigma"], kept["bands"]) != (self.sigma, self.bands):
            raise ConfigError(
                f"correlated noise must go on as it began, with sigma {kept['sigma']:g} over {kept['bands']} bands, "
                f"got {self.sigma:g} and {self.bands}. Set clip bound, noise and bands back, or start a new run."
            )
        if self.sigma == 0.0:
            return update, state
        past: list[dict[str, Any]] = kept["past"]
        generator, grid, weights = secret(), grid_of(self.sigma), coefficients(self.bands)[1:]
        delta: Parameters = {}
        newest: Parameters = {}
        for name, value in update.delta.items():
            multiples = np.asarray(generator.standard_normal(value.shape) * (self.sigma / grid))
            for weight, earlier in zip(weights, past, strict=False):
                multiples -= weight * earlier[name]
            newest[name] = np.rint(multiples, out=multiples)
            delta[name] = np.empty(value.shape, value.dtype if value.dtype.kind == "f" else np.float64)
            add_multiples(value, multiples, grid, delta[name])
        return replace(update, delta=delta), {**kept, "past": [newest, *past][: self.bands - 1]}
