"""The sites of federated causal-LM fine-tuning as a Flower app's client: ``clientapp = "sfl.llm.client_app:app"``."""

from __future__ import annotations

from sfl.application.flower import client_app
from sfl.llm.config import LLMRunConfig
from sfl.llm.main import APPLICATION

__all__ = ["app"]

app = client_app(APPLICATION, LLMRunConfig)
