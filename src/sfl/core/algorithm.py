"""Algorithms: what a server sends, to whom, and what it makes of the aggregate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from sfl.core.task import Task, Update
from sfl.types import Parameters, StateTree


@dataclass(frozen=True, slots=True)
class ServerState:
    """Everything that a run is, between two rounds. A checkpoint is this value.

    Attributes:
        round: Rounds finished so far.
        parameters: The global parameters.
        algorithm: State of the algorithm and its server optimizer (moments, controls, a relay's position …).
        mechanisms: State of the server halves of the mechanisms, in order.
    """

    round: int
    parameters: Parameters
    algorithm: StateTree = None
    mechanisms: list[StateTree] = field(default_factory=list[StateTree])


class Algorithm(ABC):
    """A federated algorithm, readable beside its paper.

    The loop drives it: ``plan`` → exchange → aggregator → server halves of the mechanisms → ``finish``. All three
    methods are pure: what must be remembered is in the state.
    """

    @abstractmethod
    def init(self, parameters: Parameters) -> ServerState:
        """The state before the first round."""

    @abstractmethod
    def plan(self, state: ServerState, clients: Sequence[str]) -> tuple[Task, list[str]]:
        """The task of round ``state.round + 1`` and the sites that get it, of those that are there."""

    @abstractmethod
    def finish(self, state: ServerState, aggregate: Update) -> ServerState:
        """The state after the round. ``aggregate.delta`` belongs to the callee and may be overwritten."""
