"""What an application trains: its model, its data, its loss. The rest is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Generic

import numpy as np
from torch import nn

from sfl.application.config import RunConfig
from sfl.core import rng
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.filters.layers import chosen_layers, parse_layers
from sfl.train.cleaning import CleaningReport
from sfl.train.collection import Collection
from sfl.train.dpsgd import ExampleLosses
from sfl.train.examples import Batch, Examples, repeated
from sfl.train.federated import Federated, R
from sfl.train.module import frozen, lend_parameters
from sfl.train.pretrained import Pretrained
from sfl.train.private import PrivateTraining
from sfl.train.trainer import BatchLoss, Outcome, Trainer
from sfl.types import Metrics, Parameters

__all__ = ["Workload"]


@dataclass(frozen=True, kw_only=True)
class Workload(ABC, Generic[R, Batch]):
    """A model that is fine-tuned on records shared out among sites. It travels to them as plain values.

    Attributes:
        name: The application's name.
        unit: What a record's size is counted in, in the report.
        kinds: What a site's records are of, in the report.
        shows: Whether the report shows what a model says, beside figures.
        collection: Where its records come from.
        config: The run's configuration.
        model: The model that the run starts from.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    kinds: ClassVar[str]
    shows: ClassVar[bool] = False
    collection: ClassVar[Collection[Any]]
    config: RunConfig
    model: Pretrained

    def data(self) -> tuple[Federated[R], CleaningReport]:
        """All sites' records, as the configuration shares them out; read once in each process."""
        return _shared(self.collection, self.config)

    def forget(self) -> None:
        """Read the records anew: their files may have changed since an earlier run of this process."""
        _shared.cache_clear()

    @abstractmethod
    def module(self, device: str, *, seed: int = 0) -> nn.Module:
        """The worker's one model of this workload, on a device; ``seed`` is that of arrays which a checkpoint lacks."""

    @abstractmethod
    def examples(self, records: Sequence[R]) -> Examples[Batch]:
        """Records as the model is shown them."""

    @abstractmethod
    def loss(self, module: nn.Module, batch: Batch) -> BatchLoss:
        """Forward pass of the model on a batch."""

    @abstractmethod
    def losses(self, module: nn.Module, batch: Batch) -> ExampleLosses:
        """The same, of each example on its own."""

    @abstractmethod
    def figures(self, outcome: Outcome) -> Metrics:
        """What is reported of a pass: ``loss``, and an accuracy under its field's name."""

    @abstractmethod
    def described(self, records: Sequence[R]) -> dict[str, Any]:
        """What the report says of some records, as JSON types: ``size`` in units, and ``top``, most frequent kinds."""

    @abstractmethod
    def save(self, module: nn.Module, folder: Path) -> None:
        """Write the model as its field's libraries load it."""

    @property
    def privacy(self) -> PrivacyConfig:
        """The run's protections, with what the workload adds to them."""
        return self.config.privacy

    def received(self, parameters: Parameters, client_id: int) -> Parameters:  # noqa: ARG002
        """What a site makes of the parameters that it was sent, before it trains."""
        return parameters

    def returned(self, trained: Parameters, parameters: Parameters, client_id: int) -> Parameters:  # noqa: ARG002
        """What a site sends of what it has trained, given what it was sent."""
        return trained

    def trainer(self) -> Trainer[Batch]:
        """The trainer of a site."""
        return Trainer(loss=self.loss, size=len, learning_rate=self.config.client.learning_rate)

    def private(self, examples: int) -> PrivateTraining[Batch]:
        """The private trainer of a site with so many examples."""
        config = self.config
        return PrivateTraining.of(self.losses, config.client, self.privacy, config.federation, examples)

    @contextmanager
    def frozen(self, module: nn.Module) -> Generator[None]:
        """For a while, what the protections say that sites do not train is not trained."""
        layers = parse_layers(self.privacy.freeze_layers)
        with frozen(module, chosen_layers(layers, list(lend_parameters(module)))):
            yield

    def batches(self, examples: Examples[Batch], generator: np.random.Generator) -> Iterator[Batch]:
        """A round's, as the options say how many steps or passes it is."""
        client, each = self.config.client, self.trainer().accumulation
        steps = None if client.local_steps is None else client.local_steps * each
        return repeated(examples, epochs=client.local_epochs, steps=steps, generator=generator)

    def sample(self, records: Sequence[R], site: str) -> Sequence[R]:
        """At most ``client.eval_records`` of the records, always the same ones."""
        limit, seed = self.config.client.eval_records, self.config.federation.seed
        if not 0 < limit < len(records):
            return records
        generator = rng.public(seed, 0, f"{self.name}-eval-sample", site)
        chosen = generator.choice(len(records), size=limit, replace=False)
        return [records[index] for index in sorted(chosen)]

    def evaluate(self, module: nn.Module, examples: Examples[Batch]) -> Outcome:
        """One pass whose masks depend on the seed alone, so that rounds can be compared."""
        generator = rng.public(self.config.federation.seed, 0, f"{self.name}-eval-mask")
        return self.trainer().evaluate(module, examples.evaluation(generator))

    def shown(self, module: nn.Module) -> list[tuple[str, str]]:  # noqa: ARG002
        """What a model says to some prompts: pairs of prompt and continuation."""
        return []


@lru_cache(maxsize=1)
def _shared(collection: Collection[Any], config: RunConfig) -> tuple[Federated[Any], CleaningReport]:
    federation, data = config.federation, config.client.data
    by_file = federation.partition.strip() == "files"
    records, report = collection.load_sites(data) if by_file else collection.load(data)
    shared = collection.federate(
        records,
        partition=federation.partition,
        num_clients=federation.num_clients,
        seed=federation.seed,
        global_fraction=config.global_fraction,
    )
    return shared, report
