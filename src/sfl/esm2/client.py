"""A site that fine-tunes ESM2 on its own proteins by masked language modelling."""

from __future__ import annotations

from typing import Any

from sfl.application.client import WorkloadClient
from sfl.esm2.config import ESM2RunConfig
from sfl.esm2.workload import ESM2Workload
from sfl.train.pretrained import Pretrained

__all__ = ["ESM2Client"]


class ESM2Client(WorkloadClient):
    """Trains the worker's one resident model on this site's proteins.

    Args:
        client_id: Index of the site, from 0.
        device: Where to compute.
        config: The run's configuration.
        model: The model to load.
    """

    def __init__(
        self, client_id: int = 0, device: str = "cpu", *, config: ESM2RunConfig, model: Pretrained, **kwargs: Any
    ) -> None:
        workload = ESM2Workload(config=config, model=model)
        super().__init__(client_id=client_id, device=device, workload=workload, **kwargs)
