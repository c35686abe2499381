"""The server of federated ESM2 as a Flower app's server: ``serverapp = "sfl.esm2.server_app:app"``."""

from __future__ import annotations

from sfl.application.flower import server_app
from sfl.esm2.config import ESM2RunConfig
from sfl.esm2.main import APPLICATION

__all__ = ["app"]

app = server_app(APPLICATION, ESM2RunConfig)
