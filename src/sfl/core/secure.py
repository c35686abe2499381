"""Secure sums: what keeps a single site's update from the server, in steps that any engine carries.

The server's half is a generator without I/O: it yields the step to carry out and is sent the replies, one by one. A
site's half answers steps, and closes what its client's training has made.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

from sfl.core.task import Task, Update
from sfl.errors import CompositionError
from sfl.types import Metrics, Parameters, StateTree

__all__ = ["Exchanging", "Keeper", "SecureSite", "SecureSum", "Step", "Summing", "Total"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step:
    """One exchange of a protocol.

    Attributes:
        tasks: By site, in site order, what it is asked. Sites that are given the same object are sent one task.
        check: Refuses an answer with a ``ProtocolError``: its site is rejected, and the round goes on without it.
    """

    tasks: Mapping[str, Task]
    check: Callable[[Update], object]


@dataclass(frozen=True, slots=True)
class Total:
    """What a secure sum has made of a round.

    Attributes:
        mean: The weighted mean of the deltas; its weight is the sum of theirs.
        sites: Whose updates are in it.
        figures: What may be said of the sum alone.
    """

    mean: Update
    sites: tuple[str, ...]
    figures: Metrics = field(default_factory=dict[str, float])


Exchanging: TypeAlias = Generator[Step, Iterable[Update], T]
"""Some steps of a server's half. What it is sent are the updates that arrived; it must draw all of them."""
Summing: TypeAlias = Exchanging[Total]
"""A server's half of a round at work."""


class Keeper(Protocol):
    """Where a site keeps what nobody else may read."""

    def load(self) -> StateTree:
        """What was kept last; ``None`` if nothing was."""
        ...

    def save(self, tree: StateTree) -> None:
        """Keep this in its place."""
        ...


class SecureSite(ABC):
    """A site's half, for one site. What it must remember between steps it keeps itself: sites may change processes."""

    @abstractmethod
    def answer(self, task: Task) -> Update:
        """Do a step that needs no training.

        Raises:
            ProtocolError: If the step is one that this site must not take.
        """

    @abstractmethod
    def opened(self, task: Task) -> Task:
        """A task to train or evaluate, as the site's client may see it.

        Raises:
            ProtocolError: If this site must not answer it.
        """

    @abstractmethod
    def closed(self, update: Update, task: Task, expected: Parameters) -> Update:
        """What leaves of an update that answers ``task``: nothing in it tells of this site alone.

        Args:
            update: What the client's training, and the site's transforms, have made.
            task: As it came.
            expected: What updates may hold, as arrays like it.

        Raises:
            ProtocolError: If this site must not send it.
        """

    def ended(self) -> None:  # noqa: B027 - most have nothing to forget
        """The run is over: what was kept for a step that will not come is forgotten."""


class SecureSum(ABC):
    """A way to keep single updates from the server. A frozen dataclass: it travels with the job."""

    @property
    def heaviest(self) -> float:
        """The largest weight that a site may have; infinite if there is none."""
        return math.inf

    @abstractmethod
    def require(self, cohort: int) -> None:
        """Whether rounds of ``cohort`` planned sites can be summed as promised; asked before a run.

        Raises:
            CompositionError: If not, with what to change.
        """

    def among(self, least: int) -> SecureSum:  # noqa: ARG002
        """The same whose sites refuse a sum of fewer than ``least`` of them, as far as they can know."""
        return self

    def on_grid(self, grid: float, reach: float) -> SecureSum:  # noqa: ARG002
        """The same for updates whose values are multiples of a power of two, to be added up exactly.

        Args:
            grid: The power of two.
            reach: The largest coordinate of a sum.
        """
        raise CompositionError(
            f"noise of whole numbers must come with secure aggregation by masks, got {type(self).__name__} and a grid "
            f"of {grid:g}. Use SecAgg."
        )

    @abstractmethod
    def begin(self) -> StateTree:
        """What the server remembers of a new run; goes into its checkpoints."""

    @abstractmethod
    def summing(self, task: Task, cohort: Sequence[str], expected: Parameters, memory: StateTree) -> Summing:
        """The server's half of one round.

        Args:
            task: The task to train.
            cohort: The planned sites, in order.
            expected: What updates may hold, as arrays like it.
            memory: From ``begin``.

        Raises:
            RoundError: If too few sites stay.
        """

    @abstractmethod
    def site(self, name: str, keeper: Keeper, identity: Any = None) -> SecureSite:
        """The half of a site.

        Args:
            name: Its name.
            keeper: Where it keeps what it must remember.
            identity: Who it is, as the other sites know it; by default that of a simulated site.
        """

    def remarks(self, figures: Metrics) -> list[str]:  # noqa: ARG002
        """What a person should know of a round with these figures."""
        return []

    @abstractmethod
    def described(self, cohort: int) -> list[str]:
        """What rounds of ``cohort`` sites promise, and on what that rests, in words for the run's screen and report."""
