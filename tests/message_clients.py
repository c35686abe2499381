"""A client for tests of message sizes. Engines' own processes import this module by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.types import ClientUpdate, Config, Evaluation, Parameters

SHAPE = (40, 50)


def optimum(client_id: int) -> np.ndarray:
    """A site's own optimum: coordinates of very different sizes, and each site's far from the others' mean."""
    draw = np.random.default_rng(client_id)
    return (np.exp(draw.normal(size=SHAPE)) * np.sign(draw.normal(size=SHAPE))).astype(np.float32)


def model() -> Parameters:
    """Weights, and of all else that travels one."""
    return {
        "w": np.zeros(SHAPE, np.float32),
        "bias": np.full(7, 0.5, np.float32),
        "norm.running_var": np.ones(80, np.float32),
        "wide": np.full(100, 0.3),
        "half": np.full(90, 0.1, np.float16),
        "count": np.array([3, 2**40], np.int64),
    }


class Pulled(BaseFederatedClient):
    """``steps`` of gradient descent on ½ ‖w − o‖², o the site's own; the other arrays move a little."""

    honours = frozenset({"proximal", "drift", "learning_rate"})

    def __init__(self, client_id: int = 0, device: str = "cpu", *, steps: int = 2, **kwargs: Any) -> None:
        super().__init__(client_id=client_id, device=device, **kwargs)
        self.optimum, self.steps = optimum(client_id), steps

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        w = parameters["w"]
        rate = np.float32(0.1)
        for _ in range(self.steps):
            w = w - rate * (w - self.optimum + self.terms.added({"w": w})["w"])
        self.travelled = float(self.steps * rate)
        self.state["tasks"] = self.state.get("tasks", 0) + 1
        moved = {
            name: value + 1 if value.dtype.kind == "i" else value * value.dtype.type(0.99)
            for name, value in parameters.items()
            if name != "w"
        }
        return {"w": w, **moved}, 1 + self.client_id, {"loss": self._loss(w)}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return self._loss(parameters["w"]), 1 + self.client_id, {}

    def _loss(self, w: np.ndarray) -> float:
        return float(0.5 * np.sum(np.square((w - self.optimum).astype(np.float64))))
