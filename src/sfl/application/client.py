"""A site that fine-tunes a workload's model on its own records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from sfl.application.config import RunConfig
from sfl.application.workload import Workload
from sfl.client.base import BaseFederatedClient
from sfl.core import rng
from sfl.core.mechanism import DpEvent
from sfl.core.terms import DRIFT, LEARNING_RATE, PROXIMAL, LocalTerms
from sfl.train.module import lend_parameters, load_parameters
from sfl.train.pretrained import Pretrained
from sfl.train.trainer import Outcome
from sfl.types import ClientUpdate, Config, Evaluation, Parameters

__all__ = ["WorkloadClient"]


class WorkloadClient(BaseFederatedClient):
    """Trains the worker's one resident model on this site's records.

    Args:
        client_id: Index of the site, from 0.
        device: Where to compute.
        config: The run's configuration.
        model: The model to load.

    Attributes:
        kind: What is trained.
    """

    kind: ClassVar[type[Workload[Any, Any]]]
    lends_arrays: ClassVar[bool] = True
    honours = frozenset({PROXIMAL, DRIFT, LEARNING_RATE})

    def __init__(
        self, client_id: int = 0, device: str = "cpu", *, config: RunConfig, model: Pretrained, **kwargs: Any
    ) -> None:
        super().__init__(client_id=client_id, device=device, **kwargs)
        self.workload = workload = self.kind(config=config, model=model)
        self.seed = workload.config.federation.seed
        site = workload.data()[0].sites[client_id]
        self.train = workload.examples(site.train)
        self.held_out = workload.examples(workload.sample(site.held_out, site.name))
        self.private = workload.private(len(self.train)) if workload.privacy.dpsgd else None
        if self.private is not None:  # its steps are the private optimizer's own
            self.honours = frozenset()

    def privacy_event(self, config: Config) -> DpEvent | None:
        """What a round of DP-SGD costs each example; ``None`` for plain training."""
        return None if self.private is None else self.private.event()

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        """Local AdamW steps; the weight is the number of examples that the site trains on."""
        module = self.workload.module(self.device)
        load_parameters(module, self.workload.received(parameters, self.client_id))
        with self.workload.frozen(module):
            outcome = self._fit(module, int(config["round"]))
        self.travelled = outcome.travelled
        trained = self.workload.returned(lend_parameters(module), parameters, self.client_id)
        return trained, len(self.train), self.workload.figures(outcome)

    def _fit(self, module: nn.Module, round: int) -> Outcome:
        if self.private is not None:
            return self.private.fit(module, self.train)
        generator = rng.public(self.seed, round, f"{self.workload.name}-train", self.site)
        seed = rng.public_seed(self.seed, round, "torch", self.site)
        batches = self.workload.batches(self.train, generator)
        return self.workload.trainer().fit(module, batches, seed, self._own_terms())

    def _own_terms(self) -> LocalTerms:
        """The algorithm's, of what this site has: nothing is pulled, or drifts, where it has nothing."""
        had = {
            name: self.workload.received(value, self.client_id)
            for name in ("anchor", "drift")
            if (value := getattr(self.terms, name)) is not None
        }
        return replace(self.terms, **had)

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        """The workload's figures on the site's held-out records, with the same masks every round."""
        module = self.workload.module(self.device)
        load_parameters(module, parameters)
        outcome = self.workload.evaluate(module, self.held_out)
        return outcome.loss, len(self.held_out), self.workload.figures(outcome)
