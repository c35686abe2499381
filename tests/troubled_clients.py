"""A client of sites in trouble. It imports nothing heavy: what is waited for is the trouble, not torch."""

from __future__ import annotations

import os
import signal
import time
from importlib import import_module
from typing import Any

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.types import Config, Evaluation, Parameters


def initial() -> Parameters:
    return {"w": np.zeros((3, 4), np.float32), "count": np.array([3, 2**40])}


class Troubled(BaseFederatedClient):
    """What a site may do wrong, by its number: raise, answer in the wrong shape or kind, import what is not there.

    Site 0 is killed at work in round ``dies``, and site 1 never answers in round two.
    """

    def __init__(self, client_id: int = 0, device: str = "cpu", *, dies: int = 1) -> None:
        super().__init__(client_id=client_id, device=device)
        self.dies = dies
        if client_id == 5:
            import_module("a_module_that_is_not_there")

    def compute_update(self, parameters: Parameters, config: Config) -> Any:
        updated: dict[str, Any] = {name: value + value.dtype.type(1) for name, value in parameters.items()}
        if config["round"] == 1 and self.client_id == 2:
            raise RuntimeError("the scanner at this hospital is down")
        if config["round"] == 1 and self.client_id == 3:
            updated["w"] = updated["w"][:2]
        if config["round"] == 1 and self.client_id == 4:
            updated = {name: value.tolist() for name, value in updated.items()}
        if config["round"] == self.dies and self.client_id == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if config["round"] == 2 and self.client_id == 1:
            time.sleep(3600)
        return updated, 1, {}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return None, 1, {}
