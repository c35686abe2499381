"""The sites of federated ESM2 as a Flower app's client: ``clientapp = "sfl.esm2.client_app:app"``."""

from __future__ import annotations

from sfl.application.flower import client_app
from sfl.esm2.config import ESM2RunConfig
from sfl.esm2.main import APPLICATION

__all__ = ["app"]

app = client_app(APPLICATION, ESM2RunConfig)
