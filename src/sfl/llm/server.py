"""The server's side of federated causal-LM fine-tuning."""

from __future__ import annotations

from sfl.application.server import workload_recipe
from sfl.llm.client import LLMClient
from sfl.llm.config import LLMRunConfig
from sfl.llm.workload import LLMWorkload
from sfl.recipe import FedAvgRecipe
from sfl.server.lora import lora_aggregator
from sfl.train.pretrained import Pretrained

__all__ = ["llm_recipe"]


def llm_recipe(config: LLMRunConfig, model: Pretrained, *, device: str = "cpu") -> FedAvgRecipe:
    """Federated fine-tuning of a causal language model.

    Args:
        config: The run's configuration.
        model: The model that the run starts from.
        device: Where the server evaluates.

    Raises:
        CompositionError: If the options do not fit each other.
    """
    workload = LLMWorkload(config=config, model=model)
    return workload_recipe(
        workload,
        LLMClient,
        device=device,
        aggregator=lambda chosen: lora_aggregator(config.client.lora_aggregation, chosen),
    )
