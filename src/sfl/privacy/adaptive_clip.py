"""A clip bound that follows a quantile of the sites' norms, privately.

By Andrew, Thakkar, McMahan and Ramaswamy, "Differentially private learning with adaptive clipping", NeurIPS 2021.

Each site sends, beside its clipped update, whether it was below the bound. The server adds noise to both sums and moves
the bound; what it learns of the norms is paid for out of the same noise multiplier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast, final

import numpy as np

from sfl.core.mechanism import DpEvent, Mechanism, Placement
from sfl.core.task import Update
from sfl.core.transform import Stateless, Transform
from sfl.errors import ConfigError
from sfl.privacy.clip import Clip
from sfl.privacy.dp import GaussianMechanism
from sfl.privacy.noise import add_noise, secret
from sfl.types import Config, Parameters, StateTree

__all__ = ["AdaptiveClip", "delta_noise_multiplier"]

COUNT = "sfl.below_clip"
"""The array of no dimension that travels beside an update: +1/2 if it was below the bound, -1/2 if it was clipped."""

BOUND = "dp_clip"
"""The scalar of a task that says the bound of its round."""

_LARGEST = 1e9  # the bound stays within this factor of the first, whatever the noise says


def delta_noise_multiplier(noise_multiplier: float, count_noise: float) -> float:
    """z_Δ = (z⁻² − (2σ_b)⁻²)^(−1/2): the update's share, so that both releases together cost z (Theorem 1).

    Args:
        noise_multiplier: z, of both together.
        count_noise: σ_b, the standard deviation on the count.

    Raises:
        ConfigError: If the count alone would cost more than z allows.

    Example:
        >>> round(delta_noise_multiplier(1.0, 5.0), 7)
        1.0050378
    """
    if noise_multiplier == 0.0:
        return 0.0
    if not count_noise > noise_multiplier / 2.0:
        raise ConfigError(
            f"count_noise must be above half the noise multiplier ({noise_multiplier / 2.0:g}), got {count_noise:g}: "
            "a quantile without noise is not private. Raise it."
        )
    return noise_multiplier / math.sqrt(1.0 - (noise_multiplier / (2.0 * count_noise)) ** 2)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveClip(Mechanism):
    """Gaussian noise on a sum clipped at a bound that follows the ``target_quantile`` of the sites' norms.

    C ← C · exp(−η (b̃ − γ)), b̃ the noisy share of sites below C (Algorithm 1). Central only: the bound is the server's
    word. The count is part of the release that ``event`` charges, and is not charged a second time.

    | input | result |
    |---|---|
    | a zero update | below the bound |
    | no site took part | the bound moves by noise alone |
    | noise puts b̃ outside [0, 1] | taken as 0 or 1 |

    Attributes:
        noise_multiplier: z, of update and count together.
        count_noise: σ_b; the paper takes a twentieth of the planned cohort.
        cohort: Sites that a round is planned with, the denominator of b̃.
        initial_clip: C of the first round.
        target_quantile: γ, in (0, 1).
        learning_rate: η.
        sampling_rate: See ``GaussianMechanism``.
        per_layer: See ``Clip``; an update is below the bound if none of its arrays was clipped.
    """

    noise_multiplier: float
    count_noise: float
    cohort: float
    initial_clip: float = 0.1
    target_quantile: float = 0.5
    learning_rate: float = 0.2
    sampling_rate: float = 1.0
    per_layer: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.target_quantile < 1.0:
            raise ConfigError(f"target_quantile must be in (0, 1), got {self.target_quantile}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0.0 and self.cohort >= 1.0):
            raise ConfigError(
                f"learning_rate must be positive and cohort at least 1, got {self.learning_rate}, {self.cohort}."
            )
        self._plain()
        delta_noise_multiplier(self.noise_multiplier, self.count_noise)

    def _plain(self) -> GaussianMechanism:
        return GaussianMechanism(
            clip_norm=self.initial_clip,
            noise_multiplier=self.noise_multiplier,
            per_layer=self.per_layer,
            sampling_rate=self.sampling_rate,
        )

    @property
    def placement(self) -> Placement:
        """On the server."""
        return "central"

    def clip(self) -> Transform:
        """To the round's bound, with the indicator beside it."""
        return ClipAndCount(self.initial_clip, self.per_layer)

    def noise(self) -> Transform:
        """On both sums; it moves the bound."""
        return NoiseAndMove(self)

    def event(self, cohort: int, population: int) -> DpEvent:
        """That of Gaussian noise of z: the bound of a round depends on earlier releases alone."""
        return replace(self._plain().event(cohort, population), mechanism="gaussian, adaptive clip")


@final
@dataclass(frozen=True, slots=True)
class ClipAndCount(Stateless):
    """A site's half: ``Clip`` to the bound that came with the task, and whether it was needed."""

    raises_norm: ClassVar[bool] = False
    clips: ClassVar[bool] = True

    bound: float
    per_layer: bool = False

    def told(self, config: Config) -> Self:
        """With the bound that the task carries."""
        return replace(self, bound=float(config.get(BOUND, self.bound)))

    def sends(self, parameters: Parameters) -> Parameters:
        """The indicator beside the rest."""
        return {**parameters, COUNT: np.zeros(())}

    def change(self, update: Update) -> Update:
        """The clipped delta and its indicator; a clip gives back what is below the bound as it is."""
        clipped = Clip(self.bound, self.per_layer).change(update)
        below = all(clipped.delta[name] is value for name, value in update.delta.items())
        return replace(clipped, delta={**clipped.delta, COUNT: np.asarray(0.5 if below else -0.5)})


@final
@dataclass(frozen=True, slots=True)
class NoiseAndMove(Transform):
    """The server's half: noise on the sum of updates and on the count, then the bound of the next round."""

    adds_noise: ClassVar[bool] = True

    mechanism: AdaptiveClip

    def init(self, parameters: Parameters) -> StateTree:  # noqa: ARG002
        """The first bound."""
        return {"bound": self.mechanism.initial_clip}

    def tells(self, state: StateTree) -> Config:
        """The round's bound."""
        return {BOUND: _bound(state)}

    def apply(
        self,
        update: Update,
        state: StateTree,
        rng: np.random.Generator,  # noqa: ARG002
    ) -> tuple[Update, StateTree]:
        """The noised sum, without the count; the moved bound."""
        mechanism, bound = self.mechanism, _bound(state)
        generator = secret()
        delta = dict(update.delta)
        count = add_noise({COUNT: np.asarray(delta.pop(COUNT), np.float64)}, mechanism.count_noise, generator)[COUNT]
        share = min(max(float(count) / mechanism.cohort + 0.5, 0.0), 1.0)
        sigma = delta_noise_multiplier(mechanism.noise_multiplier, mechanism.count_noise) * bound
        moved = bound * math.exp(-mechanism.learning_rate * (share - mechanism.target_quantile))
        first = mechanism.initial_clip
        after = min(max(moved, first / _LARGEST), first * _LARGEST)
        return replace(update, delta=add_noise(delta, sigma, generator)), {"bound": after}


def _bound(state: StateTree) -> float:
    return float(cast("dict[str, Any]", state)["bound"])
