"""Training of ESM2 that is private for each protein: DP-SGD on samples that nobody else can know."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sfl.core.mechanism import DpEvent
from sfl.esm2.alphabet import PAD, PackedProteins
from sfl.esm2.config import ESM2RunConfig
from sfl.esm2.masking import MaskedBatch, mask, pad
from sfl.esm2.model import ModelSource
from sfl.privacy import noise
from sfl.privacy.accountant import Method
from sfl.privacy.audit import NormCheck, check_norm_bound
from sfl.privacy.dpsgd import calibrate_dpsgd, dpsgd_event, poisson_batches
from sfl.privacy.filters.layers import chosen_layers, parse_layers
from sfl.train.dpsgd import ExampleLosses, PrivateTrainer
from sfl.train.module import frozen, lend_parameters, load_parameters
from sfl.train.trainer import BatchLoss, Outcome
from sfl.types import Parameters

if TYPE_CHECKING:
    from transformers import EsmForMaskedLM

__all__ = ["PrivateTraining", "example_norms", "first_site", "mlm_losses"]

_LOOKED_AT = 32  # proteins of an audit


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

    def trainer(self) -> PrivateTrainer[MaskedBatch]:
        """The trainer of this site."""
        client, privacy = self.config.client, self.config.privacy
        return PrivateTrainer(
            losses=mlm_losses,
            size=len,
            learning_rate=client.learning_rate,
            clip_norm=privacy.dpsgd_clip,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=float(client.batch_size),
            clipping="ghost" if privacy.dpsgd_ghost else "hooks",
            autoclip=privacy.dpsgd_autoclip,
        )

    def fit(self, module: nn.Module, proteins: PackedProteins) -> Outcome:
        """One round's steps, in place."""
        return self.trainer().fit(module, self._samples(proteins), secrets.randbits(63))

    def _samples(self, proteins: PackedProteins) -> Iterator[list[MaskedBatch]]:
        client = self.config.client
        lengths = np.minimum(proteins.lengths, client.max_length)
        physical = self.config.privacy.dpsgd_physical_batch or client.batch_size
        drawn = poisson_batches(len(proteins), self.rate, self.steps, physical, noise.secret(), lengths=lengths)
        for sample in drawn:
            yield list(self.masked(proteins, sample))

    def masked(self, proteins: PackedProteins, batches: Iterable[NDArray[np.int64]]) -> Iterator[MaskedBatch]:
        """Physical batches of proteins, given by their positions, as the model is shown them."""
        generator, longest = noise.secret(), self.config.client.max_length
        for batch in batches:
            spare = np.maximum(proteins.lengths[batch] - longest, 0)
            starts = generator.integers(0, spare + 1)
            crops = [proteins[int(i)][start : start + longest] for i, start in zip(batch, starts, strict=True)]
            yield mask(pad(crops), generator, apart=True)


def mlm_losses(module: nn.Module, batch: MaskedBatch) -> ExampleLosses:
    """Each protein's mean cross-entropy over its own selected residues; 0 for a protein without any.

    The head runs on the selected positions alone, padded to the protein with most of them, so that each keeps a row.
    """
    model = cast("EsmForMaskedLM", module)
    device = model.lm_head.bias.device
    ids = torch.from_numpy(batch.ids).to(device)
    attention = (ids != PAD).long() if batch.padded else torch.ones_like(ids)
    hidden = model.esm(ids, attention_mask=attention).last_hidden_state
    counts = batch.selected.sum(1)
    first = np.argsort(~batch.selected, axis=1, kind="stable")[:, : max(int(counts.max()), 1)]
    chosen = torch.from_numpy(np.arange(first.shape[1]) < counts[:, None]).to(device)
    places = torch.from_numpy(first).to(device)[:, :, None].expand(-1, -1, hidden.shape[2])
    logits = model.lm_head(hidden.gather(1, places)).float()
    targets = torch.full(chosen.shape, -100, device=device)
    targets[chosen] = torch.from_numpy(batch.targets).to(device)
    each = nn.functional.cross_entropy(logits.mT, targets, reduction="none", ignore_index=-100)
    losses = each.sum(1) / chosen.sum(1).clamp(min=1)
    correct = (logits.argmax(-1) == targets).sum()
    return ExampleLosses(losses, BatchLoss(each.sum(), len(batch.targets), correct))


def first_site(config: ESM2RunConfig) -> tuple[PrivateTraining, PackedProteins]:
    """How the run's first site trains, and its proteins."""
    from sfl.esm2.client import federated_data

    proteins = PackedProteins.pack(record.sequence for record in federated_data(config)[0].sites[0].train)
    return PrivateTraining.of(config, len(proteins)), proteins


def example_norms(config: ESM2RunConfig, model: ModelSource, parameters: Parameters | None) -> NormCheck:
    """What single proteins of the first site add to a step's sum, before its noise, against the bound.

    Args:
        config: The run's configuration.
        model: Its model.
        parameters: Where it stands; ``None`` for the model as it is loaded.
    """
    from sfl.esm2.client import resident_model

    module = resident_model(model, "cpu")
    if parameters is not None:
        load_parameters(module, parameters)
    training, proteins = first_site(config)
    trainer = training.trainer()
    names = chosen_layers(parse_layers(config.privacy.freeze_layers), list(lend_parameters(module)))
    with frozen(module, names):
        batches = islice(training.masked(proteins, [np.array([index]) for index in range(len(proteins))]), _LOOKED_AT)
        sums = [trainer.clipped_sum(module, batch) for batch in batches]
    values = ({name: value.cpu().numpy() for name, value in each.items()} for each in sums)
    return check_norm_bound(values, trainer.sensitivity, mechanism="DP-SGD", slack=noise.SLACK / 2.0)


@lru_cache(maxsize=64)
def _calibrated(epsilon: float, delta: float, rate: float, steps: int, method: Method) -> float:
    return calibrate_dpsgd(epsilon, delta=delta, sampling_rate=rate, steps=steps, method=method)
