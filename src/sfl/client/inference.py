"""Federated evaluation and inference: clients that only read the model."""

from __future__ import annotations

from abc import abstractmethod
from typing import final

from sfl.client.base import BaseFederatedClient
from sfl.types import ClientUpdate, Config, Evaluation, Metrics, Parameters


class BaseInferenceClient(BaseFederatedClient):
    """A site that runs the model on its own data and reports figures; it never trains.

    Implement ``infer``. Predictions stay on the site: keep them there, or count them into metrics.

    Example:
        >>> class Positives(BaseInferenceClient):
        ...     def infer(self, parameters, config):
        ...         return 40, {"positives": 12.0}
        >>> Positives().evaluate({}, {})
        (0.0, 40, {'positives': 12.0})
    """

    @abstractmethod
    def infer(self, parameters: Parameters, config: Config) -> tuple[int, Metrics]:
        """Run the model locally; how many examples, and figures about them (``loss`` among them if there is one)."""

    @final
    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        """The figures of ``infer``; its ``loss`` metric, if any, is the loss, else 0."""
        count, metrics = self.infer(parameters, config)
        return float(metrics.get("loss", 0.0)), count, metrics

    @final
    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        """The parameters as they came: a round of inference changes nothing."""
        count, metrics = self.infer(parameters, config)
        return dict(parameters), count, metrics
