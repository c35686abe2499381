"""A site that fine-tunes a causal language model on its own texts."""

from __future__ import annotations

from sfl.application.client import WorkloadClient
from sfl.llm.workload import LLMWorkload

__all__ = ["LLMClient"]


class LLMClient(WorkloadClient):
    """Trains the worker's one resident language model, or adapters to it; arguments as of ``WorkloadClient``."""

    kind = LLMWorkload
    worker_imports = ("transformers.models.gpt2.modeling_gpt2",)  # whatever the model, it is nearly all of it
