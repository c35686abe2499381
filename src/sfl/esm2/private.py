"""Training of ESM2 that is private for each protein: DP-SGD on samples that nobody else can know."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sfl.core.mechanism import DpEvent
from sfl.esm2.alphabet import PackedProteins
from sfl.esm2.config import ESM2RunConfig
from sfl.esm2.masking import MaskedBatch, mask, pad
from sfl.privacy import noise
from sfl.privacy.accountant import Method
from sfl.privacy.dpsgd import calibrate_dpsgd, dpsgd_event, poisson_batches
from sfl.train.dpsgd import ExampleLosses, PrivateTrainer
from sfl.train.trainer import Outcome

__all__ = ["PrivateTraining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateTraining:
    """How one site trains: each protein is in a step with probability batch_size / proteins, by itself.

    Sampling, crops, masks and dropout are drawn from secret randomness: with a seed that others know, one protein more
    would change what is drawn for all that follow it.

    Attributes:
        config: The run's configuration.
        rate: q.
        steps: Steps in a round.
        noise_multiplier: z.
    """

    config: ESM2RunConfig
    rate: float
    steps: int
    noise_multiplier: float

    @classmethod
    def of(cls, config: ESM2RunConfig, proteins: int) -> PrivateTraining:
        """For a site with so many proteins; with a target ε, the noise that meets it over all planned rounds."""
        client, privacy = config.client, config.privacy
        rate = min(1.0, client.batch_size / proteins)
        passes = (client.local_epochs or 1) * math.ceil(proteins / client.batch_size)
        steps = client.local_steps or passes
        found = privacy.dpsgd_noise
        if privacy.dpsgd_target_epsilon is not None:
            rounds = math.ceil(config.federation.num_rounds / config.federation.turns)
            found = _calibrated(
                privacy.dpsgd_target_epsilon, privacy.dpsgd_delta, rate, steps * rounds, privacy.dp_accountant
            )
        return cls(config=config, rate=rate, steps=steps, noise_multiplier=found)

    def event(self) -> DpEvent:
        """What a round costs each protein."""
        return dpsgd_event(self.noise_multiplier, self.rate, self.steps)

    def trainer(self, losses: Callable[[nn.Module, MaskedBatch], ExampleLosses]) -> PrivateTrainer[MaskedBatch]:
        """The trainer of this site."""
        client, privacy = self.config.client, self.config.privacy
        return PrivateTrainer(
            losses=losses,
            size=len,
            learning_rate=client.learning_rate,
            clip_norm=privacy.dpsgd_clip,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=float(client.batch_size),
            clipping="ghost" if privacy.dpsgd_ghost else "hooks",
            autoclip=privacy.dpsgd_autoclip,
        )

    def fit(
        self,
        module: nn.Module,
        proteins: PackedProteins,
        losses: Callable[[nn.Module, MaskedBatch], ExampleLosses],
    ) -> Outcome:
        """One round's steps, in place."""
        return self.trainer(losses).fit(module, self._samples(proteins), secrets.randbits(63))

    def _samples(self, proteins: PackedProteins) -> Iterator[list[MaskedBatch]]:
        client = self.config.client
        generator = noise.secret()
        lengths = np.minimum(proteins.lengths, client.max_length)
        physical = self.config.privacy.dpsgd_physical_batch or client.batch_size
        drawn = poisson_batches(len(proteins), self.rate, self.steps, physical, generator, lengths=lengths)
        for sample in drawn:
            yield [self._masked(proteins, lengths, batch, generator) for batch in sample]

    def _masked(
        self,
        proteins: PackedProteins,
        lengths: NDArray[np.int64],
        batch: NDArray[np.int64],
        generator: np.random.Generator,
    ) -> MaskedBatch:
        starts = generator.integers(0, proteins.lengths[batch] - lengths[batch] + 1)
        longest = self.config.client.max_length
        crops = [proteins[int(i)][start : start + longest] for i, start in zip(batch, starts, strict=True)]
        return mask(pad(crops), generator, apart=True)


@lru_cache(maxsize=64)
def _calibrated(epsilon: float, delta: float, rate: float, steps: int, method: Method) -> float:
    return calibrate_dpsgd(epsilon, delta=delta, sampling_rate=rate, steps=steps, method=method)
