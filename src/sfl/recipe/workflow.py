"""Recipes of jobs whose order of tasks is their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from sfl.client.rule import LocalRule
from sfl.client.swarm import SwarmRule
from sfl.core.aggregator import Aggregator, WeightedMean
from sfl.errors import CompositionError
from sfl.recipe.averaging import FedAvgRecipe
from sfl.recipe.base import Recipe
from sfl.server.algorithms import CrossSiteEvaluation, Cyclic, FedBuff, FederatedEvaluation, Order, Swarm
from sfl.server.workflow import Workflow

__all__ = ["CyclicRecipe", "FedBuffRecipe", "FedEvalRecipe", "SwarmRecipe", "WorkflowRecipe"]


@dataclass(frozen=True, kw_only=True)
class WorkflowRecipe(Recipe):
    """A job whose order of tasks is its own.

    Attributes:
        workflow: What the server does.
    """

    workflow: Workflow

    def algorithm(self) -> Workflow:
        """The workflow."""
        return self.workflow


@dataclass(frozen=True, kw_only=True)
class _OrderedRecipe(FedAvgRecipe):
    """A job whose order of tasks is its own; what means something for rounds of averaging alone is refused."""

    def _check_plain(self) -> None:
        federation = self.federation
        odd = {
            "aggregator": not self._takes(self.aggregator),
            "fraction_fit": federation.fraction_fit != 1.0,
            "sampling": federation.sampling != "fixed",
            "schedule": self.schedule is not None and self.schedule.changes,
        }
        wrong = [name for name, is_odd in odd.items() if is_odd]
        if wrong:
            raise CompositionError(
                f"{type(self).__name__} must be left its own order of sites and rounds, got {', '.join(wrong)}. "
                "Leave them out."
            )

    def _takes(self, aggregator: Aggregator) -> bool:
        """Whether the job uses an aggregator like this."""
        return isinstance(aggregator, WeightedMean)


@dataclass(frozen=True, kw_only=True)
class CyclicRecipe(_OrderedRecipe):
    """Cyclic weight transfer: see ``Cyclic``.

    Attributes:
        order: By name in every round, or random.
    """

    order: Order = "fixed"

    def algorithm(self) -> Workflow:
        """The relay."""
        self._check_plain()
        return Cyclic(order=self.order)


@dataclass(frozen=True, kw_only=True)
class SwarmRecipe(_OrderedRecipe):
    """Swarm learning: FedAvg whose aggregating site changes every round; see ``Swarm``. It needs ``sfl[privacy]``.

    Any aggregator will do that remembers nothing from round to round, as another site holds it in each.
    """

    def _takes(self, aggregator: Aggregator) -> bool:
        return type(aggregator).step is Aggregator.step

    def algorithm(self) -> Workflow:
        """The server's half."""
        self._check_plain()
        return Swarm()

    def rule(self) -> LocalRule:
        """The sites' half."""
        return SwarmRule(self.aggregator)


@dataclass(frozen=True, kw_only=True)
class FedBuffRecipe(_OrderedRecipe):
    """Buffered asynchronous aggregation: see ``FedBuff``. The sites evaluate the last model alone.

    Attributes:
        buffer: Updates that make a round.
        concurrency: Sites that train at a time; 0 is all.
    """

    buffer: int = 2
    concurrency: int = 0

    def _takes(self, aggregator: Aggregator) -> bool:  # noqa: ARG002
        return True

    def algorithm(self) -> Workflow:
        """The workflow."""
        self._check_plain()
        rate = self.server_learning_rate
        return FedBuff(buffer=self.buffer, concurrency=self.concurrency, server_learning_rate=rate)


@dataclass(frozen=True, kw_only=True)
class FedEvalRecipe(_OrderedRecipe):
    """Evaluation of one model on every site, or, with ``cross_site``, of every site's model on every site.

    Attributes:
        cross_site: Whether each site first trains a model of its own; see ``CrossSiteEvaluation``.
    """

    cross_site: bool = False

    def resolved(self) -> Self:
        """With its one round."""
        done = super().resolved()
        return replace(done, federation=replace(done.federation, num_rounds=1), evaluate_every="end")

    def algorithm(self) -> Workflow:
        """The workflow."""
        self._check_plain()
        return CrossSiteEvaluation() if self.cross_site else FederatedEvaluation()
