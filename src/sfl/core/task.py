"""What goes out to a site, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from sfl.core import arrays
from sfl.types import Config, Metrics, Parameters

FIT = "fit"
EVALUATE = "evaluate"
END = "end"
"""The last task of a run: nothing to compute, let go of what outlives the client."""

EXAMPLE_EPSILON = "example_epsilon"
"""The figure under which a site says what its own ledger has spent of each example's privacy."""

SIMULATED_SECONDS = "simulated_seconds"
"""The figure of a round that says when it ended in simulated time."""

SPENT = "its examples' privacy budget is spent"
"""In the reason of a reply whose site may train no more."""

NUM_UPDATES = "num_updates"
"""Among an aggregate's metrics: of how many updates it is made; absent where that must not show."""

SERVER = "server"
"""The name under which an aggregate travels through the server halves of the mechanisms."""


@dataclass(frozen=True, slots=True)
class Task:
    """One instruction to a cohort.

    Attributes:
        name: What to do: ``"fit"``, ``"evaluate"``, or a step of a protocol.
        round: The round it belongs to, from 1 (0 for the evaluation before the first).
        parameters: The global parameters, read-only.
        config: Scalars for the client. It never carries a seed for noise, masks or keys.
        packed: What travels in place of the parameters where they are quantised; they are what sites make of it.
            Engines that hand over memory leave it out.
    """

    name: str
    round: int
    parameters: Parameters
    config: Config = field(default_factory=dict[str, bool | int | float | str])
    packed: Parameters | None = None

    @property
    def travels(self) -> Parameters:
        """The arrays that are carried where arrays are carried."""
        return self.parameters if self.packed is None else self.packed


@dataclass(frozen=True, slots=True)
class Update:
    """What a site sends back. ``delta`` is what mechanisms protect; ``weight`` and ``metrics`` are not protected.

    Attributes:
        site: The site's name.
        delta: Updated minus received parameters; empty for an evaluation.
        weight: Its weight in a mean: the number of examples, unless a recipe fixes it.
        metrics: Named figures.

    The arrays of a delta may be lent: they are valid until the next reply is drawn from the engine. An aggregator that
    declares ``needs = "individual"`` receives copies it may keep.
    """

    site: str
    delta: Parameters
    weight: float
    metrics: Metrics = field(default_factory=dict[str, float])


class Status(StrEnum):
    """How a planned site ended a round."""

    USED = "used"
    FAILED = "failed"
    LATE = "late"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Reply:
    """How one planned site ended one task. Every planned site ends with exactly one.

    Attributes:
        site: The site's name.
        status: Used, failed (its own error), late, or rejected (it broke the contract).
        update: The update, when the status is ``USED``.
        reason: Why it was not used, for people.
        seconds: Time the site spent on the task.
        details: A traceback, where there is one.
        logs: Lines that the site's own code logged meanwhile, at INFO and above; none from a private job.
        ticket: The number of the send that it answers; the engine sets it.
        known_finite: Whether the engine itself ran the check for NaN and inf on these very arrays, in a process of
            its own, so that the server need not read them once more. Never taken from a wire.
    """

    site: str
    status: Status
    update: Update | None = None
    reason: str = ""
    seconds: float = 0.0
    details: str = ""
    logs: tuple[str, ...] = ()
    ticket: int = 0
    known_finite: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the delta: what would travel."""
        return arrays.nbytes(self.update.delta) if self.update is not None else 0
