"""The server's side of federated ESM2: initial parameters, global evaluation, the final model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfl.core import arrays, rng
from sfl.errors import CompositionError, DataError
from sfl.esm2.alphabet import PackedProteins
from sfl.esm2.client import (
    ESM2Client,
    esm2_trainer,
    evaluate_proteins,
    federated_data,
    figures,
    resident_model,
    sample,
    with_perplexity,
)
from sfl.esm2.config import ESM2RunConfig
from sfl.esm2.masking import training_batches
from sfl.esm2.model import ModelSource, save_model
from sfl.privacy.runner_utils import build_protections
from sfl.recipe import FedAvgRecipe, chosen_recipe
from sfl.server.robust import build_aggregator
from sfl.train.devices import limit_threads
from sfl.train.module import copy_parameters, lend_parameters, load_parameters, release_resident
from sfl.types import Metrics, Parameters


@dataclass(frozen=True, kw_only=True)
class ESM2Server:
    """What the server does with the model. Called in the server's own process.

    Attributes:
        config: The run's configuration.
        model: The model that the run starts from.
        device: Where the server evaluates.
    """

    config: ESM2RunConfig
    model: ModelSource
    device: str = "cpu"

    def initial_parameters(self) -> Parameters:
        """The pretrained weights, read anew: an earlier run of this process has trained the resident model."""
        release_resident()
        seed = rng.public_seed(self.config.federation.seed, 0, "initial-parameters")
        return copy_parameters(resident_model(self.model, self.device, seed=seed))

    def central(self, parameters: Parameters) -> Metrics:
        """Figures on the proteins that no site has; empty where there are none."""
        client, seed = self.config.client, self.config.federation.seed
        held_out = self._held_out()[0]
        if not held_out:
            return {}
        limit_threads(self.config.federation.threads)
        module = resident_model(self.model, self.device)
        load_parameters(module, parameters)
        proteins = sample(held_out, client.eval_proteins, seed, "global")
        return figures(evaluate_proteins(esm2_trainer(client), module, proteins, client, seed))

    def root_update(self, parameters: Parameters, round: int) -> Parameters:
        """What the server's own training on its share of the held-out proteins makes of the parameters, as a site's.

        Raises:
            DataError: If there are too few held-out proteins to share.
        """
        client, seed = self.config.client, self.config.federation.seed
        own = self._held_out()[1]
        if not own:
            raise DataError(
                "a root update must have held-out proteins that no site has, got less than 2. Give more data, or "
                "choose an aggregation without one."
            )
        limit_threads(self.config.federation.threads)
        module = resident_model(self.model, self.device)
        load_parameters(module, parameters)
        batches = training_batches(
            PackedProteins.pack(own),
            client.batch_size,
            client.max_length,
            epochs=client.local_epochs,
            steps=client.local_steps,
            generator=rng.public(seed, round, "esm2-root"),
        )
        esm2_trainer(client).fit(module, batches, rng.public_seed(seed, round, "torch-root"))
        return arrays.subtract(lend_parameters(module), parameters)

    def _held_out(self) -> tuple[list[str], list[str]]:
        """Proteins that no site has: those to evaluate on, and every second one for the root update if there is one."""
        proteins = [record.sequence for record in federated_data(self.config)[0].held_out]
        return (proteins[::2], proteins[1::2]) if self.config.aggregation.needs_root else (proteins, [])

    def export(self, parameters: Parameters, folder: Path) -> None:
        """The final model as ``transformers`` loads it."""
        module = resident_model(self.model, self.device)
        load_parameters(module, parameters)
        save_model(module, folder)


def esm2_recipe(config: ESM2RunConfig, model: ModelSource, *, device: str = "cpu") -> FedAvgRecipe:
    """Federated training of ESM2 under masked language modelling.

    Raises:
        CompositionError: If the options do not fit each other.
    """
    if config.privacy.dpsgd and config.algorithm.algorithm in ("fedprox", "scaffold", "ditto"):
        raise CompositionError(
            f"algorithm must leave the sites' steps to the private optimizer under dpsgd, got "
            f"{config.algorithm.algorithm}. Use fedavg, or an algorithm whose work is on the server."
        )
    if config.aggregation.needs_root and config.algorithm.algorithm == "scaffold":
        raise CompositionError(
            f"aggregation must need no update of the server's own under scaffold, got {config.aggregation.aggregation}."
        )
    server = ESM2Server(config=config, model=model, device=device)
    protections = build_protections(config.privacy, config.federation)
    return chosen_recipe(
        config.algorithm,
        config.federation,
        name="esm2",
        client=ESM2Client,
        client_kwargs={"config": config, "model": model},
        initial_parameters=server.initial_parameters,
        aggregator=build_aggregator(
            config.aggregation, config.federation, server.root_update if config.aggregation.needs_root else None
        ),
        transforms=protections.transforms,
        released=protections.released,
        mechanisms=protections.mechanisms,
        budget=protections.budget,
        example_budget=protections.example_budget,
        central=server.central,
        derive=with_perplexity,
    )
