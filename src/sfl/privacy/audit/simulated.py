"""A mechanism by itself as a pipeline: clip, sum and noise, in a few lines that no engine shares."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sfl.core import arrays, rng
from sfl.core.mechanism import Mechanism
from sfl.core.task import SERVER, Update
from sfl.core.transform import Chain, Transform, flat
from sfl.core.unpack import unpacked
from sfl.errors import ConfigError
from sfl.privacy.accountant import Guarantee, PrivacyAccountant, guarantees
from sfl.privacy.adaptive_clip import BOUND
from sfl.privacy.audit.directions import Directions
from sfl.privacy.audit.norm import NormCheck, check_norm_bound
from sfl.privacy.audit.scoring import Scoring
from sfl.privacy.noise import secret
from sfl.types import Array, Config, Parameters, StateTree

__all__ = ["MechanismPipeline", "clip_bound", "norm_check"]

_CHECKED = 8  # canaries whose norm is looked at; a clip does the same with all
_ROUNDS = 3  # in which what a transform remembers can come back


def clip_bound(mechanism: Mechanism) -> float:
    """C, as the mechanism says it: what its clip half really does is what an audit is to find out.

    Raises:
        ConfigError: If it says none.
    """
    found = getattr(mechanism, "clip_norm", getattr(mechanism, "initial_clip", None))
    if not isinstance(found, int | float):
        raise ConfigError(
            f"a mechanism must say its clip bound as clip_norm or initial_clip to be audited, got "
            f"{type(mechanism).__name__}, which says none. Add one of them."
        )
    return float(found)


def norm_check(
    transforms: Iterable[Transform], mechanism: Mechanism, base: Parameters, directions: Directions, length: float
) -> NormCheck:
    """Send canaries through a site's chain without its noise halves, some rounds each, and look at their norms."""
    quiet = Chain([transform for transform in flat(list(transforms)) if not transform.adds_noise])
    bound, found = clip_bound(mechanism), list[Parameters]()
    zeros = arrays.zeros_like(base)
    for index in range(min(directions.count, _CHECKED)):
        state = quiet.init(base)
        for _ in range(_ROUNDS):
            update = Update(f"canary-{index}", directions.add(zeros, index, length * bound), 1.0)
            update, state = quiet.apply(update, state, rng.public(directions.seed, index, "audit"))
            sent = unpacked(update.delta, quiet.sends(base))
            found.append({name: value for name, value in sent.items() if name in base})
    return check_norm_bound(found, bound, mechanism=type(mechanism).__name__)


@dataclass(frozen=True, kw_only=True)
class MechanismPipeline:
    """Canaries through a mechanism's halves. A mechanism that asks for turns gets them.

    Attributes:
        mechanism: What is audited.
        canaries: Canaries in a run, each in the place of a site.
        rounds: Rounds of a run.
        delta: δ of the claim.
        size: Parameters of the model.
        length: Norm of what a canary sends, over the clip bound.
    """

    mechanism: Mechanism
    canaries: int
    rounds: int = 1
    delta: float = 1e-5
    size: int = 2000
    length: float = 10.0

    @property
    def sees(self) -> Literal["models", "updates"]:
        """Sums, unless each site protects its own update."""
        return "models" if self.mechanism.on_sum else "updates"

    @property
    def scoring(self) -> Scoring:
        """See ``Scoring.of``."""
        return Scoring.of(self.mechanism, self.mechanism.rounds_apart)

    @property
    def claim(self) -> Guarantee:
        """All rounds of a canary, composed."""
        event = self.mechanism.event(self.canaries, self.canaries)
        turns = math.ceil(self.rounds / self.mechanism.rounds_apart)
        (found,) = guarantees([replace(event, count=event.count * turns)], PrivacyAccountant(delta=self.delta))
        return found

    def norms(self) -> tuple[NormCheck, ...]:
        """That of the clip half."""
        zeros = {"w": np.zeros(self.size)}
        directions = Directions.within(zeros, self.canaries, 0)
        return (norm_check([self.mechanism.clip()], self.mechanism, zeros, directions, self.length),)

    def observe(self, coins: Array, seed: int) -> Array:
        """See ``Pipeline``."""
        return _Simulation(self, coins, seed).run()


class _Simulation:
    """One run."""

    def __init__(self, pipeline: MechanismPipeline, coins: Array, seed: int) -> None:
        self.pipeline, self.coins = pipeline, coins
        self.mechanism = pipeline.mechanism
        self.zeros: Parameters = {"w": np.zeros(pipeline.size)}
        self.directions = Directions.within(self.zeros, len(coins), seed)
        self.event = self.mechanism.event(len(coins), len(coins))
        self.clip, self.noise = self.mechanism.clip(), self.mechanism.noise()
        self.sent = self.clip.sends(self.zeros)
        self.rng = rng.public(seed, 0, "audit")

    def run(self) -> Array:
        state = self.noise.init(self.sent)
        central = self.mechanism.placement == "central"
        seen = np.zeros((self.pipeline.rounds, len(self.coins)))
        for round in range(self.pipeline.rounds):
            total = {name: np.zeros(value.shape) for name, value in self.sent.items()}
            config = self.noise.tells(state) if central else {}
            for index in self._drawn(round):
                delta = self._site(index, config, state)
                if not self.mechanism.on_sum:
                    seen[round, index] = self.directions.along(delta, index)
                for name, value in delta.items():
                    total[name] += value
            if central:
                update, state = self.noise.apply(Update(SERVER, total, 1.0), state, self.rng)
                total = update.delta
            if self.mechanism.on_sum:
                seen[round] = self.directions.project(total)
        return seen

    def _drawn(self, round: int) -> list[int]:
        """Who takes part in a round."""
        apart, count = self.mechanism.rounds_apart, len(self.coins)
        drawn = secret().random(count) < self.event.sampling_rate
        mirrored = self.event.adjacency == "replace_one"
        return [i for i in range(count) if drawn[i] and (round - i) % apart == 0 and (mirrored or self.coins[i])]

    def _site(self, index: int, config: Config, state: StateTree) -> Parameters:
        length = self.pipeline.length * float(config.get(BOUND, clip_bound(self.mechanism)))
        sign = 1.0 if self.coins[index] else -1.0
        update = Update(f"canary-{index}", self.directions.add(self.zeros, index, sign * length), 1.0)
        update, _ = self.clip.told(config).apply(update, self.clip.init(self.zeros), self.rng)
        if self.mechanism.placement == "local":
            update, _ = self.noise.apply(update, state, self.rng)
        return update.delta
