"""Training that is private for each example: DP-SGD on samples that nobody else can know."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Generic

import numpy as np
from torch import nn

from sfl.core.mechanism import DpEvent
from sfl.privacy import noise
from sfl.privacy.accountant import Method
from sfl.privacy.audit import NormCheck, check_norm_bound
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.dpsgd import calibrate_dpsgd, dpsgd_event, poisson_batches
from sfl.train.dpsgd import ExampleLosses, PrivateTrainer
from sfl.train.examples import Batch, Examples
from sfl.train.trainer import Outcome
from sfl.types import ClientConfig, FederationConfig

__all__ = ["PrivateTraining"]

_LOOKED_AT = 32  # examples of an audit


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateTraining(Generic[Batch]):
    """How one site trains: each example is in a step with probability batch_size / examples, by itself.

    Sampling, crops, masks and dropout are drawn from secret randomness: with a seed that others know, one example more
    would change what is drawn for all that follow it.

    Attributes:
        losses: Each example's own loss.
        client: How a site trains.
        privacy: Clip, noise and their kind.
        rate: q.
        steps: Steps in a round.
        noise_multiplier: z.
    """

    losses: Callable[[nn.Module, Batch], ExampleLosses]
    client: ClientConfig
    privacy: PrivacyConfig
    rate: float
    steps: int
    noise_multiplier: float

    @classmethod
    def of(
        cls,
        losses: Callable[[nn.Module, Batch], ExampleLosses],
        client: ClientConfig,
        privacy: PrivacyConfig,
        federation: FederationConfig,
        examples: int,
    ) -> PrivateTraining[Batch]:
        """For a site with so many examples; with a target ε, the noise that meets it over all planned rounds."""
        rate = min(1.0, client.batch_size / examples)
        passes = (client.local_epochs or 1) * math.ceil(examples / client.batch_size)
        steps = client.local_steps or passes
        found = privacy.dpsgd_noise
        if privacy.dpsgd_target_epsilon is not None:
            rounds = math.ceil(federation.num_rounds / federation.turns)
            found = _calibrated(
                privacy.dpsgd_target_epsilon, privacy.dpsgd_delta, rate, steps * rounds, privacy.dp_accountant
            )
        return cls(
            losses=losses,
            client=client,
            privacy=privacy,
            rate=rate,
            steps=steps,
            noise_multiplier=found,
        )

    def event(self) -> DpEvent:
        """What a round costs each example."""
        return dpsgd_event(self.noise_multiplier, self.rate, self.steps)

    def trainer(self) -> PrivateTrainer[Batch]:
        """The trainer of this site."""
        return PrivateTrainer(
            losses=self.losses,
            size=len,
            learning_rate=self.client.learning_rate,
            clip_norm=self.privacy.dpsgd_clip,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=float(self.client.batch_size),
            clipping="ghost" if self.privacy.dpsgd_ghost else "hooks",
            autoclip=self.privacy.dpsgd_autoclip,
        )

    def fit(self, module: nn.Module, examples: Examples[Batch]) -> Outcome:
        """One round's steps, in place."""
        return self.trainer().fit(module, self._samples(examples), secrets.randbits(63))

    def _samples(self, examples: Examples[Batch]) -> Iterator[list[Batch]]:
        physical = self.privacy.dpsgd_physical_batch or self.client.batch_size
        generator = noise.secret()
        drawn = poisson_batches(
            len(examples), self.rate, self.steps, physical, noise.secret(), lengths=examples.lengths
        )
        for sample in drawn:
            yield [examples.apart(batch, generator) for batch in sample]

    def example_norms(self, module: nn.Module, examples: Examples[Batch]) -> NormCheck:
        """What single examples add to a step's sum, before its noise, against the bound."""
        trainer, generator = self.trainer(), noise.secret()
        alone = (examples.apart(np.array([index]), generator) for index in range(len(examples)))
        sums = [trainer.clipped_sum(module, batch) for batch in islice(alone, _LOOKED_AT)]
        values = ({name: value.cpu().numpy() for name, value in each.items()} for each in sums)
        return check_norm_bound(values, trainer.sensitivity, mechanism="DP-SGD", slack=noise.SLACK / 2.0)


@lru_cache(maxsize=64)
def _calibrated(epsilon: float, delta: float, rate: float, steps: int, method: Method) -> float:
    return calibrate_dpsgd(epsilon, delta=delta, sampling_rate=rate, steps=steps, method=method)
