"""Audits of whole runs: canaries in the place of a recipe's sites, through its own chain, on the engine of choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from sfl.client.canary import Canaries, CanaryClient
from sfl.core.algorithm import Algorithm
from sfl.core.events import Observer
from sfl.core.mechanism import Mechanism
from sfl.errors import CompositionError, ConfigError
from sfl.privacy.accountant import Guarantee
from sfl.privacy.audit import AuditReport, NormCheck, PrivacyAuditor
from sfl.privacy.audit.directions import Directions
from sfl.privacy.audit.scoring import Scoring
from sfl.privacy.audit.simulated import clip_bound, norm_check
from sfl.privacy.budget import PrivacyBudget
from sfl.privacy.shuffle import ShuffledGaussian
from sfl.recipe import Environment, Recipe
from sfl.server.federate import charges
from sfl.server.job import Job
from sfl.server.watch import OwnParts, Watch, seen_by
from sfl.types import Array, FederationConfig, Parameters, site_names

__all__ = ["RecipePipeline", "audit_recipe"]


def audit_recipe(
    recipe: Recipe,
    env: Environment | None = None,
    *,
    canaries: int = 500,
    confidence: float = 0.95,
    sites: int | None = None,
    observers: Sequence[Observer] = (),
) -> AuditReport:
    """Audit a recipe's site-level privacy, on any environment. Nobody's data is touched, and no budget is charged.

    Args:
        recipe: The job; its sites, clients and data are replaced by canaries, all else stays.
        env: Where to run; by default in-process.
        canaries: How many, at least: the run is repeated until there are as many.
        confidence: Of the lower bound.
        sites: Sites of each run; by default the recipe's. Many in one run are cheaper than many runs.
        observers: Called with every event of the runs.

    Raises:
        CompositionError: If the recipe has no site-level mechanism, or no room for a canary.

    Example:
        >>> import numpy as np
        >>> from sfl.client.sum_client import SumClient
        >>> from sfl.privacy.dp import GaussianMechanism
        >>> from sfl.recipe import FedAvgRecipe
        >>> recipe = FedAvgRecipe(name="private", client=SumClient, initial_parameters={"w": np.zeros(400)},
        ...                       mechanisms=(GaussianMechanism(clip_norm=1.0, noise_multiplier=4.0),))
        >>> audit_recipe(recipe, canaries=100, sites=101).contradicted
        False
    """
    pipeline = RecipePipeline(recipe=recipe, env=env, sites=sites, observers=tuple(observers))
    return PrivacyAuditor(canaries=canaries, confidence=confidence).run_pipeline_audit(pipeline)


@dataclass(frozen=True, kw_only=True)
class RecipePipeline:
    """A recipe as ``PrivacyAuditor.run_pipeline_audit`` takes it.

    Transforms, mechanisms, sampling, aggregation, server step and engine are the recipe's. Its clients are replaced by
    ``CanaryClient``, its callbacks by the adversary's, and its budget by none: no site has data.

    Attributes:
        recipe: The job.
        env: Where it runs; ``None`` is in-process.
        sites: Sites in place of the recipe's; not where a mechanism counts them.
        length: Norm of a canary's step over the clip bound.
        observers: Called with every event.
    """

    recipe: Recipe
    env: Environment | None = None
    sites: int | None = None
    length: float = 10.0
    observers: tuple[Observer, ...] = ()

    @property
    def canaries(self) -> int:
        """Sites less bystanders, of which there is one for each turn unless tails is a step of its own."""
        return self._federation.num_clients - (0 if self._mirrored else self._federation.turns)

    @property
    def rounds(self) -> int:
        """The recipe's."""
        return self._federation.num_rounds

    @property
    def sees(self) -> Literal["models", "updates"]:
        """Each site's own updates, if every mechanism protects those by themselves; else the models."""
        return "models" if any(mechanism.on_sum for mechanism in self._mechanisms) else "updates"

    @property
    def scoring(self) -> Scoring:
        """For the mechanism that is nearest to what is seen."""
        return Scoring.of(self._mechanisms[-1], self._federation.turns)

    @property
    def claim(self) -> Guarantee:
        """Of the events that the loop charges for such a run."""
        return self._claim

    @cached_property
    def _claim(self) -> Guarantee:
        job, federation = self._job, self._federation
        algorithm = job.algorithm
        if not isinstance(algorithm, Algorithm):
            raise CompositionError("an audited recipe must describe rounds, got a workflow.")
        events = [
            event
            for number in range(1, federation.num_rounds + 1)
            for event in charges(job, algorithm, number, federation.planned_sites, federation.num_clients)
        ]
        adversary = "server_trusted" if self.sees == "models" else "server_curious"
        found = [g for g in job.accounting.spent(events) if (g.unit, g.adversary) == ("site", adversary)]
        if not found:
            raise CompositionError(
                f"an audited recipe must claim site-level privacy against who sees its {self.sees}, got none."
            )
        return found[0]

    def norms(self) -> tuple[NormCheck, ...]:
        """What leaves a canary's own chain before noise, against the bound of its last mechanism."""
        transforms = self._job.program.chain.transforms
        directions = Directions.within(self._inside, self.canaries, 0)
        return (norm_check(transforms, self._mechanisms[-1], self._initial, directions, self.length),)

    def observe(self, coins: Array, seed: int) -> Array:
        """Run it once; see ``Pipeline``."""
        directions = Directions.within(self._inside, len(coins), seed)
        recipe = self._with(directions, "".join("1" if coin else "0" for coin in coins))
        result = recipe.execute(self.env, observers=self.observers)
        return seen_by(result.state.callbacks[0])

    @cached_property
    def _mechanisms(self) -> tuple[Mechanism, ...]:
        """The recipe's; of shuffled noise the noise alone, as the shuffler is none of ours to audit."""
        if not self.recipe.mechanisms:
            raise CompositionError("an audited recipe must have a mechanism, got none: nothing is claimed.")
        return tuple(m.local if isinstance(m, ShuffledGaussian) else m for m in self.recipe.mechanisms)

    @cached_property
    def _mirrored(self) -> bool:
        federation = self.recipe.federation
        events = [m.event(federation.planned_sites, federation.num_clients) for m in self._mechanisms]
        return events[-1].adjacency == "replace_one"

    @cached_property
    def _federation(self) -> FederationConfig:
        federation = self.recipe.resolved().federation
        if self.sites is not None and self.sites != federation.num_clients:
            counting = [type(m).__name__ for m in self._mechanisms if m.least_sites or hasattr(m, "cohort")]
            if counting:
                raise CompositionError(
                    f"sites must be the recipe's {federation.num_clients} with {counting[0]}, which counts them, got "
                    f"{self.sites}. Leave it out, or make the recipe for so many."
                )
            federation = replace(federation, num_clients=self.sites)
        least = federation.min_available_clients if self._mirrored else 1
        away = 0 if self._mirrored else federation.turns
        if federation.num_clients <= away:
            raise CompositionError(
                f"sites must be at least {away + 1} to be audited, got {federation.num_clients}: one for each turn "
                "stands by. Set sites."
            )
        return replace(federation, min_available_clients=least)

    @cached_property
    def _job(self) -> Job:
        """What the canaries' recipe builds; the directions do not matter to it."""
        return self._with(Directions(count=self.canaries, names=(), seed=0), "").build()

    @cached_property
    def _initial(self) -> Parameters:
        return replace(self.recipe.resolved(), callbacks=(), site_callbacks=()).build().initial()

    @cached_property
    def _inside(self) -> Parameters:
        """The arrays of floats that leave a site under the recipe's chain."""
        sent = self._job.program.chain.sends(dict(self._initial))
        inside = {name: value for name, value in self._initial.items() if name in sent and value.dtype.kind == "f"}
        if not inside:
            raise ConfigError("an audited recipe must send arrays of floats, got none that leave a site.")
        return inside

    def _with(self, directions: Directions, coins: str) -> Recipe:
        resolved = self.recipe.resolved()
        budget = self.recipe.budget or PrivacyBudget()
        names = site_names(self._federation.num_clients)[: self.canaries]
        bound = clip_bound(self._mechanisms[-1])
        canaries = Canaries(
            directions=directions, coins=coins, length=self.length, bound=bound, mirrored=self._mirrored
        )
        changed: dict[str, Any] = {"aggregator": OwnParts(directions, names)} if self.sees == "updates" else {}
        return replace(
            resolved,
            name=f"audit of {resolved.name}",
            client=CanaryClient,
            client_kwargs={"canaries": canaries},
            initial_parameters=self._initial,
            federation=self._federation,
            mechanisms=self._mechanisms,
            budget=PrivacyBudget(delta=budget.delta, accountant=budget.accountant),
            example_budget=None,
            central=None,
            derive=dict,
            callbacks=(Watch(directions),),
            site_callbacks=(),
            key_metric=None,
            evaluate_every=0,
            **changed,
        )
