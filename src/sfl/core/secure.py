"""Secure sums: what keeps a single site's update from the server, in steps that any engine carries.

The server's half is a generator without I/O: it yields the step to carry out and is sent the replies, one by one. A
site's half answers steps, and closes what its client's training has made.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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

    def common(self, name: str, make: Callable[[], bytes]) -> bytes:
        """What all sites of a simulation have in common: made by whichever asks first."""
        ...

    def seen(self, name: str) -> bytes | None:
        """The same, if any of them has asked."""
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

    @property
    def keyed(self) -> bool:
        """Whether sites have keys in common, which simulated ones find in a folder."""
        return False

    @property
    def seals(self) -> bool:
        """Whether sums stay closed to the server, too: then the global model is what sites have closed, and nothing on
        the server can work with it.
        """
        return False

    def sealed(self, arrays: Parameters) -> Parameters:  # noqa: ARG002
        """Of the arrays of a sum or a model, those that are closed to the server."""
        return {}

    def bare(self, parameters: Parameters, sealed: Parameters) -> Parameters:  # noqa: ARG002
        """Of the arrays of a model, those that ``sealed`` ones do not stand for."""
        return parameters

    def like(self, parameters: Parameters) -> Parameters:
        """The arrays of the model that the server keeps as ``parameters``; what they hold does not matter."""
        return parameters

    @abstractmethod
    def require(self, cohort: int) -> None:
        """Whether rounds of ``cohort`` planned sites can be summed as promised; asked before a run.

        Raises:
            CompositionError: If not, with what to change.
        """

    def among(self, least: int, planned: int, threads: int = 1) -> SecureSum:  # noqa: ARG002
        """The same for rounds of ``planned`` sites, which refuse sums of fewer than ``least`` if they can know.

        Args:
            least: Sites that a sum must be of.
            planned: Sites of a round.
            threads: With how many each simulated site may compute.
        """
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
    def begin(self, model: Parameters, sent: Parameters, sites: Sequence[str]) -> StateTree:
        """What the server remembers of a new run; goes into its checkpoints.

        Args:
            model: Where it starts.
            sent: What updates may hold, as arrays like it.
            sites: Names of the sites that are there.

        Raises:
            ConfigError: If it does not fit such a run.
        """

    def check_server(self, kit: Path) -> None:  # noqa: B027 - most leave nothing with a server
        """Look at the kit of a server before it works.

        Raises:
            ConfigError: If it holds what is for sites alone.
        """

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

    def kits(self, sites: Sequence[str], keeper: Keeper) -> Mapping[str, Mapping[str, bytes]]:  # noqa: ARG002
        """What kits of new sites must hold beside certificates: by site, files by name.

        Args:
            sites: Their names.
            keeper: Of any of them: a run that goes on finds there what it was begun with.
        """
        return {}

    def key(self, keeper: Keeper) -> bytes | None:  # noqa: ARG002
        """What opens a model that sites have sealed, where all of them are this person's."""
        return None

    @abstractmethod
    def identity(self, name: str, kit: Path) -> Any:
        """What a site's kit says of it.

        Raises:
            ConfigError: If it is another's, or lacks something.
        """

    @abstractmethod
    def site(self, name: str, keeper: Keeper, identity: Any = None) -> SecureSite:
        """The half of a site.

        Args:
            name: Its name.
            keeper: Where it keeps what it must remember.
            identity: From ``identity``; by default that of a simulated site.
        """

    def remarks(self, figures: Metrics) -> list[str]:  # noqa: ARG002
        """What a person should know of a round with these figures."""
        return []

    @abstractmethod
    def described(self, cohort: int) -> list[str]:
        """What rounds of ``cohort`` sites promise, and on what that rests, in words for the run's screen and report."""
