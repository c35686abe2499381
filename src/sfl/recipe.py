"""Recipes: a job described once, as frozen configuration. Only ``build()`` puts objects together."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.client.site import SiteProgram
from sfl.core import arrays
from sfl.core.aggregator import Aggregator, Sum, WeightedMean
from sfl.core.algorithm import Algorithm
from sfl.core.events import Observer
from sfl.core.mechanism import Mechanism
from sfl.core.transform import Chain, Divide, Transform, chain
from sfl.engine.base import Engine
from sfl.errors import CompositionError, ConfigError
from sfl.server.job import Job
from sfl.server.session import RunResult, run_job
from sfl.server.strategy import FedAvg, SumFedAvg
from sfl.types import Array, FederationConfig, Metrics, Parameters

__all__ = ["Environment", "FedAvgRecipe", "Recipe", "RunResult", "SumRecipe"]


class Environment(Protocol):
    """Where a recipe runs. Changing it changes nothing else."""

    def engine(self, job: Job, sites_folder: Path | None) -> Engine:
        """The engine for a job; sites keep their state under ``sites_folder``, if there is one."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Frozen description of a job.

    Attributes:
        name: Its name.
        client: The client class, or a function, called with ``client_id``, ``device`` and ``client_kwargs``.
        initial_parameters: The initial global parameters, or a function that makes them.
        federation: Sites, rounds, sampling, seed, workers.
        client_kwargs: Arguments of the client.
        aggregator: How updates become one.
        transforms: What an update passes on its site, in order.
        mechanisms: Differential privacy; the order is that of the sites.
        central: The global model's figures on global held-out data.
        derive: Adds figures that follow from others, such as a perplexity from a mean loss. It is applied to each
            site's figures and to their means, so what it adds is never averaged.
        evaluate_every: Evaluate after every n-th round and the last; 0 never evaluates.
    """

    name: str
    client: Callable[..., BaseFederatedClient]
    initial_parameters: Parameters | Callable[[], Parameters]
    federation: FederationConfig = field(default_factory=FederationConfig)
    client_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    aggregator: Aggregator = field(default_factory=WeightedMean)
    transforms: tuple[Transform, ...] = ()
    mechanisms: tuple[Mechanism, ...] = ()
    central: Callable[[Parameters], Metrics] | None = None
    derive: Callable[[Metrics], Metrics] = dict
    evaluate_every: int = 1

    @abstractmethod
    def algorithm(self) -> Algorithm:
        """The algorithm that this recipe stands for."""

    def build(self) -> Job:
        """Compose the job, after checking that its parts fit.

        Raises:
            CompositionError: Naming the parts that do not fit, and what to change.
        """
        if self.evaluate_every < 0:
            raise CompositionError(f"evaluate_every must be 0 (never) or more, got {self.evaluate_every}.")
        halves: list[Transform] = []
        for mechanism in self.mechanisms:
            halves += [mechanism.clip()] + ([mechanism.noise()] if mechanism.placement == "local" else [])
        private = bool(self.mechanisms)
        aggregator, server_chain = self._server_side()
        return Job(
            name=self.name,
            initial=self._initial,
            algorithm=self.algorithm(),
            aggregator=aggregator,
            program=SiteProgram(
                client=self.client,
                kwargs=self.client_kwargs,
                chain=chain(*self.transforms, *halves),
                fixed_weight=1.0 if private else None,
                share_metrics=not private,
            ),
            federation=self.federation,
            server_chain=server_chain,
            mechanisms=self.mechanisms,
            central=self.central,
            derive=self.derive,
            evaluate_every=self.evaluate_every,
        )

    def execute(
        self,
        env: Environment | None = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        observers: Sequence[Observer] = (),
    ) -> RunResult:
        """Run the recipe.

        Args:
            env: Where; by default in-process, as ``federation`` says.
            out: A folder for checkpoints, metrics and the report; ``None`` leaves nothing behind.
            resume: Go on from the newest whole checkpoint in ``out``.
            observers: Called with every event of the run.

        Returns:
            The final parameters and what happened in each round.

        Raises:
            CompositionError: If the parts of the recipe do not fit.
            RoundError: If a round ends with fewer usable replies than ``min_available_clients``.
        """
        if env is None:
            from importlib import import_module

            default: Environment = import_module("sfl.env").SimEnv()  # the default environment lies a layer above
            env = default
        if resume and out is None:
            raise ConfigError("out must be the folder of the run to resume, got none.")
        job = self.build()
        return run_job(job, env.engine, out=Path(out) if out is not None else None, resume=resume, observers=observers)

    def _initial(self) -> Parameters:
        given: Any = self.initial_parameters
        made: Any = given() if callable(given) else given  # what a function made is the run's already
        if not isinstance(made, Mapping):
            raise ConfigError(f"initial_parameters must be a dict of named arrays, got {type(made).__name__}.")
        return {str(name): _initial_array(name, value, copied=made is given) for name, value in made.items()}

    def _server_side(self) -> tuple[Aggregator, Chain]:
        """Central mechanisms noise the *sum*, which is then divided by the planned cohort, whoever answered."""
        central = [mechanism.noise() for mechanism in self.mechanisms if mechanism.placement == "central"]
        if not central:
            return self.aggregator, Chain()
        if not isinstance(self.aggregator, WeightedMean):
            name = type(self.aggregator).__name__
            raise CompositionError(
                f"aggregator must be WeightedMean under central noise, got {name}: its sensitivity is not known. "
                "Use the mean, or noise on the sites."
            )
        planned = max(
            self.federation.min_available_clients,
            round(self.federation.fraction_fit * self.federation.num_clients),
            1,
        )
        return Sum(), Chain([*reversed(central), Divide(planned)])


def _initial_array(name: object, value: Any, *, copied: bool) -> Array:
    """One initial array in this machine's byte order, after checking that it can be averaged."""
    array = np.array(value) if copied else np.asarray(value)
    if not (isinstance(name, str) and _is_real(array) and arrays.is_finite(array)):
        raise ConfigError(
            f"initial_parameters must be finite arrays of real numbers under names, got {name!r}: {value!r:.60}."
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _is_real(array: Array) -> bool:
    return array.dtype.kind in "fiub" and array.dtype.itemsize <= 8  # what a checkpoint holds


@dataclass(frozen=True, kw_only=True)
class FedAvgRecipe(Recipe):
    """Federated averaging (McMahan et al. 2017).

    Attributes:
        server_learning_rate: Step of the server on the mean delta; 1 is the paper's.
    """

    server_learning_rate: float = 1.0

    def algorithm(self) -> Algorithm:
        """FedAvg over the federation's sampling."""
        if not math.isfinite(self.server_learning_rate):
            raise CompositionError(f"server_learning_rate must be finite, got {self.server_learning_rate}.")
        return FedAvg(
            fraction_fit=self.federation.fraction_fit,
            min_clients=self.federation.min_available_clients,
            server_learning_rate=self.server_learning_rate,
            seed=self.federation.seed,
        )


@dataclass(frozen=True, kw_only=True)
class SumRecipe(Recipe):
    """The sum of what the sites hold: the smallest working example."""

    aggregator: Aggregator = field(default_factory=Sum)

    def algorithm(self) -> Algorithm:
        """SumFedAvg over all sites."""
        return SumFedAvg(seed=self.federation.seed)
