"""A site that fine-tunes ESM2 on its own proteins by masked language modelling."""

from __future__ import annotations

from sfl.application.client import WorkloadClient
from sfl.esm2.workload import ESM2Workload

__all__ = ["ESM2Client"]


class ESM2Client(WorkloadClient):
    """Trains the worker's one resident ESM2 on this site's proteins; arguments as of ``WorkloadClient``."""

    kind = ESM2Workload
    worker_imports = ("transformers.models.esm.modeling_esm",)
