"""The smallest working client: every site holds one secret number."""

from __future__ import annotations

from typing import Any

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.types import ClientUpdate, Config, Evaluation, Parameters


class SumClient(BaseFederatedClient):
    """Adds its secret, ``base_secret + client_id``, to the parameter ``"sum"``.

    Example:
        >>> SumClient(client_id=2, base_secret=7.0).secret
        9.0
    """

    def __init__(self, client_id: int = 0, device: str = "cpu", *, base_secret: float = 7.0, **kwargs: Any) -> None:
        super().__init__(client_id=client_id, device=device, **kwargs)
        self.secret = base_secret + client_id

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        """The parameter plus this site's secret."""
        return {"sum": parameters["sum"] + self.secret}, 1, {"loss": 0.0}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        """How far the sum is from this site's own secret: a figure to look at, nothing to optimise."""
        return float(np.abs(parameters["sum"] - self.secret).sum()), 1, {}
