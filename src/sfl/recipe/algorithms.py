"""Recipes of the algorithms beyond averaging, under the field's names."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sfl.client.ditto import DittoRule
from sfl.client.rule import LocalRule
from sfl.client.scaffold import ScaffoldRule
from sfl.core.algorithm import Algorithm
from sfl.core.terms import PROXIMAL_MU
from sfl.errors import CompositionError
from sfl.recipe.averaging import FedAvgRecipe
from sfl.server.algorithms import FedOpt, Scaffold, ServerOptimizer
from sfl.server.strategy import FedAvg

__all__ = [
    "DittoRecipe",
    "FedOptRecipe",
    "FedProxRecipe",
    "ScaffoldRecipe",
]


@dataclass(frozen=True, kw_only=True)
class FedProxRecipe(FedAvgRecipe):
    """FedAvg whose sites train with a proximal term (Li et al., MLSys 2020, Algorithm 2).

    A site minimises its loss plus μ/2 ‖y − w‖², w being the global model it was sent. With μ = 0 it is FedAvg, to the
    bit. A training script reads μ from ``flare.receive().meta["proximal_mu"]`` and adds the term itself.

    Attributes:
        proximal_mu: μ, 0 or more.
    """

    proximal_mu: float = 0.01

    def algorithm(self) -> Algorithm:
        """FedAvg that tells the sites μ."""
        _require_at_least_zero("proximal_mu", self.proximal_mu)
        return FedAvg(**self._averaging(), config={PROXIMAL_MU: self.proximal_mu})


@dataclass(frozen=True, kw_only=True)
class FedOptRecipe(FedAvgRecipe):
    """FedAvg with an optimizer on the server: see ``FedOpt`` (Reddi et al., ICLR 2021; Hsu et al. 2019).

    Attributes:
        optimizer: momentum, adagrad, yogi or adam; its learning rate is ``server_learning_rate``.
        beta1: Of the first moment.
        beta2: Of the second; adam and yogi.
        tau: How adaptive a step may be at most.
    """

    server_learning_rate: float = 0.01
    optimizer: ServerOptimizer = "adam"
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def algorithm(self) -> Algorithm:
        """FedOpt over the federation's sampling."""
        return FedOpt(**self._averaging(), optimizer=self.optimizer, beta1=self.beta1, beta2=self.beta2, tau=self.tau)


@dataclass(frozen=True, kw_only=True)
class ScaffoldRecipe(FedAvgRecipe):
    """SCAFFOLD (Karimireddy et al., ICML 2020), option II: see ``Scaffold`` and ``sfl.client.scaffold``.

    Twice the bytes of FedAvg travel each way, and a site remembers as much as its model.
    """

    def algorithm(self) -> Algorithm:
        """The server's half."""
        return Scaffold(**self._averaging(), planned=self.federation.planned_cohort)

    def rule(self) -> LocalRule:
        """The sites' half."""
        return ScaffoldRule()


@dataclass(frozen=True, kw_only=True)
class DittoRecipe(FedAvgRecipe):
    """Ditto (Li et al., ICML 2021): FedAvg, and at each site a model of its own that stays there.

    The figures of a site's own model are reported beside the global model's, as ``personal_...``; a site works twice
    as long.

    Attributes:
        personal_lambda: λ, how strongly the sites' own models are held at the global one; 0 or more.
    """

    personal_lambda: float = 0.1

    def rule(self) -> LocalRule:
        """The sites' half; the server's is FedAvg."""
        _require_at_least_zero("personal_lambda", self.personal_lambda)
        return DittoRule(self.personal_lambda)


def _require_at_least_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0.0):
        raise CompositionError(f"{name} must be 0 or more, got {value}.")
