"""A site that fine-tunes a causal language model on its own texts."""

from __future__ import annotations

from typing import Any

from sfl.application.client import WorkloadClient
from sfl.llm.config import LLMRunConfig
from sfl.llm.workload import LLMWorkload
from sfl.train.pretrained import Pretrained

__all__ = ["LLMClient"]


class LLMClient(WorkloadClient):
    """Trains the worker's one resident model, or adapters to it, on this site's documents.

    Args:
        client_id: Index of the site, from 0.
        device: Where to compute.
        config: The run's configuration.
        model: The model to load.
    """

    def __init__(
        self, client_id: int = 0, device: str = "cpu", *, config: LLMRunConfig, model: Pretrained, **kwargs: Any
    ) -> None:
        workload = LLMWorkload(config=config, model=model)
        super().__init__(client_id=client_id, device=device, workload=workload, **kwargs)
