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
        aggregator: What the aggregator remembers.
        callbacks: What the callbacks remember, in order.
        best: The best model so far: ``round``, ``metric`` and ``value``; ``None`` while none is known.
        engine: What the engine remembers, such as the simulated time.
        stopped: Why the run ended before its last planned round; empty if it did not.
        examples: What each site's own ledger has last said of its examples' ε, by site; ``None`` if nothing is promised
            to examples.
        secure: What a secure sum remembers of the run; ``None`` without one.
        messages: What quantised parameters have left out so far, by array; ``None`` if nothing is remembered.
    """

    round: int
    parameters: Parameters
    algorithm: StateTree = None
    mechanisms: list[StateTree] = field(default_factory=list[StateTree])
    aggregator: StateTree = None
    callbacks: list[StateTree] = field(default_factory=list[StateTree])
    best: StateTree = None
    engine: StateTree = None
    stopped: str = ""
    examples: StateTree = None
    secure: StateTree = None
    messages: StateTree = None


class Algorithm(ABC):
    """A federated algorithm, readable beside its paper.

    The loop drives it: ``plan`` → exchange → aggregator → server halves of the mechanisms → ``finish``. All three
    methods are pure: what must be remembered is in the state.
    """

    @property
    def asks(self) -> frozenset[str]:
        """What it asks of a client's own training, beside averaging: names of ``sfl.core.terms``."""
        return frozenset()

    @property
    def sampling_rate(self) -> float:
        """Probability with which each site takes part by itself, in secret; 1 unless ``plan`` draws like that."""
        return 1.0

    @property
    def rounds_apart(self) -> int:
        """A site takes part at most once in so many rounds; 1 unless ``plan`` goes by turns."""
        return 1

    def group(self, round: int) -> str:  # noqa: ARG002
        """Whose turn a round is, where sites take turns; empty where it may be anybody's."""
        return ""

    @abstractmethod
    def init(self, parameters: Parameters) -> ServerState:
        """The state before the first round."""

    def joined(self, state: ServerState, clients: Sequence[str]) -> ServerState:  # noqa: ARG002
        """The state at the start of a run, or of its continuation, with these sites."""
        return state

    @abstractmethod
    def plan(self, state: ServerState, clients: Sequence[str]) -> tuple[Task, list[str]]:
        """The task of round ``state.round + 1`` and the sites that get it, of those that are there."""

    @abstractmethod
    def finish(self, state: ServerState, aggregate: Update) -> ServerState:
        """The state after the round. ``aggregate.delta`` belongs to the callee and may be overwritten."""
