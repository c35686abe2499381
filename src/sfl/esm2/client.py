"""A site that fine-tunes ESM2 on its own proteins by masked language modelling."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from sfl.client.base import BaseFederatedClient
from sfl.core import rng
from sfl.core.mechanism import DpEvent
from sfl.core.terms import DRIFT, LEARNING_RATE, PROXIMAL
from sfl.errors import ConfigError
from sfl.esm2.alphabet import PAD, PackedProteins
from sfl.esm2.config import ESM2ClientConfig, ESM2RunConfig
from sfl.esm2.dataset import CleaningReport, FederatedProteins, federate_proteins, load_proteins, load_sites
from sfl.esm2.masking import MaskedBatch, epoch, training_batches
from sfl.esm2.model import ModelSource, load_model
from sfl.esm2.private import PrivateTraining
from sfl.privacy.filters.layers import chosen_layers, parse_layers
from sfl.train.module import frozen, lend_parameters, load_parameters, resident
from sfl.train.trainer import BatchLoss, Outcome, Trainer
from sfl.types import ClientUpdate, Config, Evaluation, Metrics, Parameters

if TYPE_CHECKING:
    from transformers import EsmForMaskedLM


class ESM2Client(BaseFederatedClient):
    """Trains the worker's one resident model on this site's proteins.

    Args:
        client_id: Index of the site, from 0.
        device: Where to compute.
        config: The run's configuration.
        model: The model to load.
    """

    lends_arrays: ClassVar[bool] = True
    honours = frozenset({PROXIMAL, DRIFT, LEARNING_RATE})

    def __init__(
        self, client_id: int = 0, device: str = "cpu", *, config: ESM2RunConfig, model: ModelSource, **kwargs: Any
    ) -> None:
        super().__init__(client_id=client_id, device=device, **kwargs)
        self.config = config.client
        self.seed = config.federation.seed
        self.model = model
        site = federated_data(config)[0].sites[client_id]
        self.train = PackedProteins.pack(record.sequence for record in site.train)
        self.held_out = sample(
            [record.sequence for record in site.held_out], self.config.eval_proteins, self.seed, site.name
        )
        self.frozen = parse_layers(config.privacy.freeze_layers)
        self.trainer = esm2_trainer(self.config)
        self.private = PrivateTraining.of(config, len(self.train)) if config.privacy.dpsgd else None
        if self.private is not None:  # its steps are the private optimizer's own
            self.honours = frozenset()

    def privacy_event(self, config: Config) -> DpEvent | None:
        """What a round of DP-SGD costs each protein; ``None`` for plain training."""
        return None if self.private is None else self.private.event()

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        """Local AdamW steps of MLM; the weight is the number of proteins that the site trains on."""
        module = resident_model(self.model, self.device)
        load_parameters(module, parameters)
        with frozen(module, chosen_layers(self.frozen, list(parameters))):
            outcome = self._fit(module, int(config["round"]))
        self.travelled = outcome.travelled
        return lend_parameters(module), len(self.train), figures(outcome)

    def _fit(self, module: EsmForMaskedLM, round: int) -> Outcome:
        if self.private is not None:
            return self.private.fit(module, self.train)
        batches = training_batches(
            self.train,
            self.config.batch_size,
            self.config.max_length,
            epochs=self.config.local_epochs,
            steps=self.config.local_steps,
            generator=rng.public(self.seed, round, "esm2-train", self.site),
        )
        return self.trainer.fit(module, batches, rng.public_seed(self.seed, round, "torch", self.site), self.terms)

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        """Loss, perplexity and masked accuracy on the site's held-out proteins, with the same masks every round."""
        module = resident_model(self.model, self.device)
        load_parameters(module, parameters)
        outcome = evaluate_proteins(self.trainer, module, self.held_out, self.config, self.seed)
        return outcome.loss, len(self.held_out), figures(outcome)


def resident_model(source: ModelSource, device: str, *, seed: int = 0) -> EsmForMaskedLM:
    """The worker's one model of this source; ``seed`` is that of arrays which the checkpoint lacks."""
    return resident(("esm2", source.location, device), lambda: _placed(load_model(source, seed=seed), device))


def _placed(model: EsmForMaskedLM, device: str) -> EsmForMaskedLM:
    try:
        return cast("Any", model).to(device)
    except (RuntimeError, AssertionError) as error:  # torch was built without it, or its memory is full
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device must be able to hold the model, got {device!r}: {reason}. Use --device cpu."
        ) from error


@lru_cache(maxsize=1)
def federated_data(config: ESM2RunConfig) -> tuple[FederatedProteins, CleaningReport]:
    """All sites' proteins, as the configuration shares them out; read once in each process."""
    federation, data = config.federation, config.client.data
    by_file = federation.partition == "files"
    records, report = load_sites(data) if by_file else load_proteins(data)
    shared = federate_proteins(
        records, partition=federation.partition, num_clients=federation.num_clients, seed=federation.seed
    )
    return shared, report


def sample(sequences: list[str], limit: int, seed: int, site: str) -> PackedProteins:
    """At most ``limit`` of the proteins (0 is all), always the same ones."""
    if 0 < limit < len(sequences):
        chosen = rng.public(seed, 0, "esm2-eval-sample", site).choice(len(sequences), size=limit, replace=False)
        sequences = [sequences[index] for index in sorted(chosen)]
    return PackedProteins.pack(sequences)


def evaluate_proteins(
    trainer: Trainer[MaskedBatch], module: nn.Module, proteins: PackedProteins, config: ESM2ClientConfig, seed: int
) -> Outcome:
    """One pass with masks that depend on the seed alone, so that rounds can be compared."""
    generator = rng.public(seed, 0, "esm2-eval-mask")
    batches = epoch(proteins, config.batch_size, config.max_length, generator, evaluation=True)
    return trainer.evaluate(module, batches)


def esm2_trainer(config: ESM2ClientConfig) -> Trainer[MaskedBatch]:
    """The MLM trainer of a configuration."""
    return Trainer(loss=mlm_loss, size=len, learning_rate=config.learning_rate)


def mlm_loss(module: nn.Module, batch: MaskedBatch) -> BatchLoss:
    """Summed cross-entropy over the selected residues; the head runs on those positions alone."""
    model = cast("EsmForMaskedLM", module)
    device = model.lm_head.bias.device
    ids = torch.from_numpy(batch.ids).to(device)
    attention = (ids != PAD).long() if batch.padded else torch.ones_like(ids)
    hidden = model.esm(ids, attention_mask=attention).last_hidden_state
    logits = model.lm_head(hidden[torch.from_numpy(batch.selected).to(device)]).float()
    targets = torch.from_numpy(batch.targets).to(device)
    total = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return BatchLoss(total, len(batch.targets), (logits.argmax(-1) == targets).sum())


def figures(outcome: Outcome) -> Metrics:
    """Loss and masked accuracy."""
    return {"loss": outcome.loss, "masked_accuracy": outcome.accuracy}


def with_perplexity(metrics: Metrics) -> Metrics:
    """Perplexity beside a loss: the exponential of the *mean* loss, also over sites.

    Example:
        >>> with_perplexity({"loss": 0.0})
        {'loss': 0.0, 'perplexity': 1.0}
    """
    if "loss" not in metrics:
        return dict(metrics)
    return {**metrics, "perplexity": math.exp(min(metrics["loss"], 80.0))}
