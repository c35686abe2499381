"""The server's side of a workload: initial parameters, global evaluation, the recipe, the final model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfl.application.workload import Workload
from sfl.client.base import BaseFederatedClient
from sfl.core import arrays, rng
from sfl.core.aggregator import Aggregator
from sfl.errors import CompositionError, DataError
from sfl.io.report import write_report
from sfl.io.run_folder import RunFolder
from sfl.privacy.runner_utils import build_protections
from sfl.recipe import FedAvgRecipe, chosen_recipe
from sfl.server.robust import build_aggregator
from sfl.train.devices import limit_threads
from sfl.train.module import copy_parameters, lend_parameters, load_parameters, release_resident
from sfl.train.per_example import recording
from sfl.types import Metrics, Parameters

__all__ = ["WorkloadServer", "with_perplexity", "workload_recipe"]


@dataclass(frozen=True, kw_only=True)
class WorkloadServer:
    """What the server does with the model. Called in the server's own process.

    Attributes:
        workload: What is trained.
        device: Where the server evaluates.
    """

    workload: Workload[Any, Any]
    device: str = "cpu"

    def initial_parameters(self) -> Parameters:
        """The pretrained weights, read anew: an earlier run of this process has trained the resident model."""
        release_resident()
        seed = rng.public_seed(self.workload.config.federation.seed, 0, "initial-parameters")
        module = self.workload.module(self.device, seed=seed)
        if self.workload.privacy.dpsgd:  # what it cannot train is said here: sites do not say why they fail
            with self.workload.frozen(module), recording(module):
                pass
        return copy_parameters(module)

    def central(self, parameters: Parameters) -> Metrics:
        """Figures on the records that no site has; empty where there are none."""
        held_out = self._held_out()[0]
        if not held_out:
            return {}
        limit_threads(self.workload.config.federation.threads)
        module = self.workload.module(self.device)
        load_parameters(module, parameters)
        examples = self.workload.examples(self.workload.sample(held_out, "global"))
        return self.workload.figures(self.workload.evaluate(module, examples))

    def root_update(self, parameters: Parameters, round: int) -> Parameters:
        """What the server's own training on its share of the held-out records makes of the parameters, as a site's.

        Raises:
            DataError: If there are too few held-out records to share.
        """
        config = self.workload.config
        own = self._held_out()[1]
        if not own:
            raise DataError(
                "a root update must have held-out records that no site has, got less than 2. Give more data, or "
                "choose an aggregation without one."
            )
        limit_threads(config.federation.threads)
        module = self.workload.module(self.device)
        load_parameters(module, parameters)
        generator = rng.public(config.federation.seed, round, f"{self.workload.name}-root")
        batches = self.workload.batches(self.workload.examples(own), generator)
        with self.workload.frozen(module):
            seed = rng.public_seed(config.federation.seed, round, "torch-root")
            self.workload.trainer().fit(module, batches, seed)
        return arrays.subtract(lend_parameters(module), parameters)

    def _held_out(self) -> tuple[list[Any], list[Any]]:
        """Records that no site has: those to evaluate on, and every second one for the root update if there is one."""
        records = list(self.workload.data()[0].held_out)
        return (records[::2], records[1::2]) if self.workload.config.aggregation.needs_root else (records, [])

    def export(self, parameters: Parameters, folder: RunFolder) -> None:
        """The final model as its field's libraries load it, and in the report what the model says before and after."""
        limit_threads(self.workload.config.federation.threads)
        has_prompts = self.workload.shows and bool(self._held_out()[0])
        shown = {"before": self._shown(self.initial_parameters())} if has_prompts else {}
        module = self.workload.module(self.device)
        load_parameters(module, parameters)
        self.workload.save(module, folder.model)
        if shown:
            folder.write_json("shown.json", {**shown, "after": self._shown(parameters)})
            write_report(folder.path)

    def _shown(self, parameters: Parameters) -> list[list[str]]:
        module = self.workload.module(self.device)
        load_parameters(module, parameters)
        return [list(pair) for pair in self.workload.shown(module)]


def workload_recipe(
    workload: Workload[Any, Any],
    client: Callable[..., BaseFederatedClient],
    *,
    device: str = "cpu",
    aggregator: Callable[[Aggregator], Aggregator] | None = None,
) -> FedAvgRecipe:
    """Federated fine-tuning of a workload's model.

    Args:
        workload: What is trained.
        client: Class of the sites' clients, called with the workload's ``config`` and ``model``.
        device: Where the server evaluates.
        aggregator: What to make of the aggregator that ``config.aggregation`` names; by default it is taken.

    Raises:
        CompositionError: If the options do not fit each other.
    """
    config = workload.config
    if config.privacy.dpsgd and config.algorithm.algorithm in ("fedprox", "scaffold", "ditto"):
        raise CompositionError(
            f"algorithm must leave the sites' steps to the private optimizer under dpsgd, got "
            f"{config.algorithm.algorithm}. Use fedavg, or an algorithm whose work is on the server."
        )
    if config.aggregation.needs_root and config.algorithm.algorithm == "scaffold":
        raise CompositionError(
            f"aggregation must need no update of the server's own under scaffold, got {config.aggregation.aggregation}."
        )
    server = WorkloadServer(workload=workload, device=device)
    protections = build_protections(workload.privacy, config.federation)
    root = server.root_update if config.aggregation.needs_root else None
    chosen = build_aggregator(config.aggregation, config.federation, root)
    return chosen_recipe(
        config.algorithm,
        config.federation,
        name=workload.name,
        client=client,
        client_kwargs={"config": config, "model": workload.model},
        initial_parameters=server.initial_parameters,
        aggregator=chosen if aggregator is None else aggregator(chosen),
        transforms=protections.transforms,
        released=protections.released,
        mechanisms=protections.mechanisms,
        secure=protections.secure,
        budget=protections.budget,
        example_budget=protections.example_budget,
        central=None if workload.privacy.seals else server.central,
        derive=with_perplexity,
    )


def with_perplexity(metrics: Metrics) -> Metrics:
    """Perplexity beside a loss: the exponential of the *mean* loss, also over sites.

    Example:
        >>> with_perplexity({"loss": 0.0})
        {'loss': 0.0, 'perplexity': 1.0}
    """
    if "loss" not in metrics:
        return dict(metrics)
    return {**metrics, "perplexity": math.exp(min(metrics["loss"], 80.0))}
