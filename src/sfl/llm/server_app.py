"""The server of federated causal-LM fine-tuning as a Flower app's server: ``serverapp = "sfl.llm.server_app:app"``."""

from __future__ import annotations

from sfl.application.flower import server_app
from sfl.llm.config import LLMRunConfig
from sfl.llm.main import APPLICATION

__all__ = ["app"]

app = server_app(APPLICATION, LLMRunConfig)
