"""Algorithms of the server: federated averaging, and the sum of the smallest example."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sfl.core import rng
from sfl.core.algorithm import Algorithm, ServerState
from sfl.core.task import FIT, Task, Update
from sfl.core.terms import LEARNING_RATE, LEARNING_RATE_FACTOR, PROXIMAL, PROXIMAL_MU
from sfl.errors import ConfigError, nearest
from sfl.server.schedule import Schedule
from sfl.types import Array, Config, Parameters, Scalar


def sample_cohort(
    clients: Sequence[str],
    fraction: float,
    minimum: int,
    generator: np.random.Generator,
    weights: Sequence[float] | None = None,
) -> list[str]:
    """``max(minimum, round(fraction * n))`` of the sites without replacement, in site order.

    With weights, sites are drawn one after the other, each in proportion to its weight among those that are left;
    never more than have one.

    Example:
        >>> sample_cohort(["a", "b", "c"], 1.0, 1, rng.public(0, 1, "cohort"))
        ['a', 'b', 'c']
    """
    size = min(len(clients), max(minimum, round(fraction * len(clients)), 1))
    if size == len(clients) and weights is None:
        return list(clients)
    odds: Array | None = None
    if weights is not None:
        odds = np.asarray(weights, dtype=np.float64)
        size = min(size, int(np.count_nonzero(odds)))
        if size == 0:
            return []
        odds = odds / odds.sum()
    chosen = generator.choice(len(clients), size=size, replace=False, p=odds)
    positions: list[int] = sorted(chosen.tolist())
    return [clients[position] for position in positions]


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Federated averaging (McMahan et al., AISTATS 2017, Algorithm 1).

    A cohort Sₜ trains from wₜ; with δₖ = wₖ − wₜ, the server takes wₜ₊₁ = wₜ + η · Σ nₖ δₖ / Σ nₖ.

    Attributes:
        fraction_fit: Share of the sites sampled in a round (C in the paper).
        min_clients: Never fewer than this many.
        server_learning_rate: η; 1 is the paper's.
        seed: Seed of the sampling, and of the clients' own public randomness.
        poisson: Draw each site by itself with probability C, by secret randomness, as amplification by sampling
            assumes. A cohort may then be of any size, also empty, and is another one when a round is repeated.
        turns: Above 1, sites take turns instead: the i-th of the run's sites takes part in round r if r - 1 and i leave
            the same remainder. The sites must stay the same.
        config: Scalars for the clients.
        schedule: What the sites' learning rate is multiplied with, round by round.
        weights: By site, how likely it is drawn beside others; empty draws all alike. Without replacement, by
            successive draws: a site that is not named weighs 0.
    """

    fraction_fit: float = 1.0
    min_clients: int = 1
    server_learning_rate: float = 1.0
    seed: int = 0
    poisson: bool = False
    turns: int = 1
    config: Config = field(default_factory=dict[str, Scalar])
    schedule: Schedule | None = None
    weights: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def asks(self) -> frozenset[str]:
        """A learning rate of the server's, under a schedule; a proximal term, where there is one."""
        scheduled = {LEARNING_RATE} if self.schedule is not None and self.schedule.changes else set[str]()
        return frozenset(scheduled | ({PROXIMAL} if self.config.get(PROXIMAL_MU) else set()))

    @property
    def sampling_rate(self) -> float:
        """C under Poisson sampling, else 1."""
        return self.fraction_fit if self.poisson else 1.0

    @property
    def rounds_apart(self) -> int:
        """The number of turns."""
        return self.turns

    def group(self, round: int) -> str:
        """Whose turn it is."""
        return f"turn {(round - 1) % self.turns + 1} of {self.turns}" if self.turns > 1 else ""

    def init(self, parameters: Parameters) -> ServerState:
        """Round 0."""
        return ServerState(round=0, parameters=parameters)

    def joined(self, state: ServerState, clients: Sequence[str]) -> ServerState:
        """With the sites and the turns: another site in the list, or fewer turns, would shift everybody's, and what was
        charged to one turn would no longer be all that its sites have spent.

        Raises:
            ConfigError: If the run began with others, or a weight is that of no site.
        """
        strange = [site for site in self.weights if site not in clients]
        if strange:
            raise ConfigError(
                f"site_weights must name sites of the federation, got {strange[0]!r}. {nearest(strange[0], clients)}"
            )
        if self.turns == 1:
            return state
        kept: dict[str, Any] = state.algorithm or {}
        if (turns := kept.get("turns", self.turns)) != self.turns:
            raise ConfigError(
                f"sites must take as many turns as the run began with, {turns}, got {self.turns}. "
                "Set fraction_fit back, or start a new run."
            )
        began = kept.get("sites", list(clients))
        if began != list(clients):
            raise ConfigError(
                f"sites that take turns must be those that the run began with, {began}, got {list(clients)}. "
                "Bring them back, or start a new run."
            )
        return replace(state, algorithm={**kept, "sites": list(clients), "turns": self.turns})

    def plan(self, state: ServerState, clients: Sequence[str]) -> tuple[Task, list[str]]:
        """The global parameters, to a sample of the sites."""
        round = state.round + 1
        if self.turns > 1:
            kept: dict[str, Any] = state.algorithm or {}
            everybody: list[str] = kept.get("sites", list(clients))
            turn = [site for index, site in enumerate(everybody) if (round - 1 - index) % self.turns == 0]
            return Task(FIT, round, state.parameters, self._told(round)), [s for s in turn if s in clients]
        return Task(FIT, round, state.parameters, self._told(round)), self._cohort(round, clients)

    def _told(self, round: int) -> Config:
        factor = {} if self.schedule is None else {LEARNING_RATE_FACTOR: self.schedule.factor(round)}
        return {**self.config, **factor, "seed": self.seed}

    def _cohort(self, round: int, clients: Sequence[str]) -> list[str]:
        if self.poisson:
            draw = secrets.SystemRandom().random
            return [client for client in clients if draw() < self.fraction_fit]
        generator = rng.public(self.seed, round, "cohort")
        weights = [self.weights.get(client, 0.0) for client in clients] if self.weights else None
        return sample_cohort(clients, self.fraction_fit, self.min_clients, generator, weights)

    def finish(self, state: ServerState, aggregate: Update) -> ServerState:
        """w + η · mean delta; arrays that no site sent stay as they are."""
        new: Parameters = {}
        for name, before in state.parameters.items():
            delta = aggregate.delta.pop(name, None)
            new[name] = before if delta is None else step(before, delta, self.server_learning_rate)
        return replace(state, round=state.round + 1, parameters=new)


@dataclass(frozen=True, kw_only=True)
class SumFedAvg(FedAvg):
    """The smallest algorithm: the new parameters are the aggregate itself, the sum of what the sites hold.

    Every round starts from zero, so the sum is the same whatever the number of rounds.
    """

    def plan(self, state: ServerState, clients: Sequence[str]) -> tuple[Task, list[str]]:
        """Zeros, to every site."""
        task, cohort = super().plan(state, clients)
        zeros = {name: np.zeros_like(value) for name, value in task.parameters.items()}
        return replace(task, parameters=zeros), cohort

    def finish(self, state: ServerState, aggregate: Update) -> ServerState:
        """The aggregate replaces the parameters."""
        return replace(state, round=state.round + 1, parameters=dict(aggregate.delta))


def step(before: Array, delta: Array, rate: float) -> Array:
    """``before + rate * delta`` in the memory of ``delta`` where the dtypes agree; integers round to nearest."""
    if rate != 1.0:
        delta *= rate
    if before.dtype.kind != "f":
        return np.asarray(before.astype(np.int64) + np.rint(delta).astype(np.int64), dtype=before.dtype)
    if delta.dtype == before.dtype:
        return np.add(before, delta, out=delta)
    return np.asarray(before + delta, dtype=before.dtype)
