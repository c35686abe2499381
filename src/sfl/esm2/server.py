"""The server's side of federated ESM2."""

from __future__ import annotations

from sfl.application.server import workload_recipe
from sfl.esm2.client import ESM2Client
from sfl.esm2.config import ESM2RunConfig
from sfl.esm2.workload import ESM2Workload
from sfl.recipe import FedAvgRecipe
from sfl.train.pretrained import Pretrained

__all__ = ["esm2_recipe"]


def esm2_recipe(config: ESM2RunConfig, model: Pretrained, *, device: str = "cpu") -> FedAvgRecipe:
    """Federated training of ESM2 under masked language modelling.

    Args:
        config: The run's configuration.
        model: The model that the run starts from.
        device: Where the server evaluates.

    Raises:
        CompositionError: If the options do not fit each other.
    """
    return workload_recipe(ESM2Workload(config=config, model=model), ESM2Client, device=device)
