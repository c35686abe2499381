"""Clients that heed what an algorithm asks of them. Engines' own processes import this module by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.types import ClientUpdate, Config, Evaluation, Parameters


def quadratic(client_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Curvature and optimum of a site's loss ½ (y − o)ᵀ H (y − o); sites differ in both."""
    draw = np.random.default_rng(client_id)
    root = draw.normal(size=(3, 3))
    return root @ root.T / 3 + 0.5 * np.eye(3), 3.0 * draw.normal(size=3)


class Steered(BaseFederatedClient):
    """``steps`` of gradient descent on ``quadratic``, heeding all terms; a counter travels beside the weights."""

    honours = frozenset({"proximal", "drift", "learning_rate"})

    def __init__(self, client_id: int = 0, device: str = "cpu", *, steps: int = 4, **kwargs: Any) -> None:
        super().__init__(client_id=client_id, device=device, **kwargs)
        self.hessian, self.optimum = quadratic(client_id)
        self.steps = steps

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        rate = 0.1 * self.terms.learning_rate_factor
        w = parameters["w"]
        for _ in range(self.steps):
            w = w - rate * (self.hessian @ (w - self.optimum) + self.terms.added({"w": w})["w"])
        self.travelled = self.steps * rate
        self.state["tasks"] = self.state.get("tasks", 0) + 1
        updated = {**parameters, "w": w}
        if "norm.num_batches_tracked" in parameters:
            updated["norm.num_batches_tracked"] = parameters["norm.num_batches_tracked"] + self.steps
        return updated, self.client_id + 1, {"loss": self._loss(w)}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return self._loss(parameters["w"]), self.client_id + 1, {}

    def _loss(self, w: np.ndarray) -> float:
        return float(0.5 * (w - self.optimum) @ self.hessian @ (w - self.optimum))


class Deaf(Steered):
    """Heeds nothing."""

    honours = frozenset()


class Unmeasured(Steered):
    """Does not say how far it went."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        done = super().compute_update(parameters, config)
        self.travelled = 0.0
        return done


class Fails(Steered):
    """Site 2 fails in round 2, and site 1 whenever it is asked for a model on its own."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        if self.client_id == 1 and config["round"] == 2:
            raise ArithmeticError("the disk is full")
        return super().compute_update(parameters, config)


class Large(Steered):
    """Adds a little to many numbers."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        self.travelled = 1.0
        return {name: value + 1e-3 for name, value in parameters.items()}, 1, {}
