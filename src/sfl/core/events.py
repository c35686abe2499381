"""What happens in a run, as values. The loop says them; consoles, metric files and reports listen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from sfl.core.task import Status
from sfl.types import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """A run begins, or goes on after ``done`` rounds.

    Attributes:
        job: Name of the recipe.
        clients: All sites, in order.
        rounds: Rounds planned in all.
        done: Rounds finished before (0 unless resumed).
        num_parameters: Scalars that travel.
        nbytes: Their size in bytes.
        engine: The engine in words, e.g. ``"in-process, 2 workers on cpu"``.
    """

    job: str
    clients: tuple[str, ...]
    rounds: int
    done: int
    num_parameters: int
    nbytes: int
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStarted:
    """A round is planned: the sites of ``cohort`` will train."""

    round: int
    cohort: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted:
    """A task goes out: ``stage`` is the task's name (``"fit"``, ``"evaluate"``) to the sites of ``cohort``."""

    round: int
    stage: str
    cohort: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFinished:
    """One planned site ended one task.

    Attributes:
        round: The round (0 is the evaluation before the first).
        stage: The task's name.
        site: The site.
        status: Used, failed, late or rejected.
        reason: Why it was not used, for people.
        details: A traceback, where there is one.
        seconds: Time the site spent.
        nbytes: Bytes of its delta.
        num_examples: What its mean is over (0 unless used).
        metrics: What it reported, ``loss`` among them.
    """

    round: int
    stage: str
    site: str
    status: Status
    reason: str = ""
    details: str = ""
    seconds: float = 0.0
    nbytes: int = 0
    num_examples: float = 0.0
    metrics: Metrics = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferProgress:
    """A large model, or a large update, is on its way; said about once a second, and at its end.

    Attributes:
        site: To or from whom.
        direction: ``"down"`` to the site, ``"up"`` from it.
        done: Bytes that have arrived.
        total: Bytes in all.
    """

    site: str
    direction: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLogged:
    """What a site's own code logged during a task, at INFO and above."""

    round: int
    site: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationStarted:
    """The aggregator is given its first update. One that streams takes the others as they arrive."""

    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationFinished:
    """The aggregate of ``num_updates`` updates has become the new global model."""

    round: int
    num_updates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BestModelSelected:
    """The global model after ``round`` (0 is the initial one) is the best so far by ``metric``, whose value it has."""

    round: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFinished:
    """A round is over; its checkpoint is written next. Round 0 holds only the evaluations before the first.

    Attributes:
        round: The round.
        fit: Weighted mean over the used sites of what they reported while training.
        evaluation: Weighted mean over the sites of the new global model on each site's held-out data.
        central: The new global model on the global held-out data (empty if the job has none).
        sites: One entry for every planned site and stage, none left out.
        seconds: Where the time went: fit, aggregate, evaluate, central, and checkpoint (of the state before).
        bytes_down: Bytes of parameters to the cohort.
        bytes_up: Bytes of deltas from it.
    """

    round: int
    fit: Metrics
    evaluation: Metrics
    central: Metrics
    sites: tuple[SiteFinished, ...]
    seconds: Mapping[str, float]
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something a person should know: ``level`` is ``"info"`` or ``"warning"``."""

    text: str
    level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    """The run is over. ``reason`` is empty when all planned rounds were done."""

    rounds: int
    seconds: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailed:
    """The run ends with an error, after ``rounds`` whole rounds. ``error`` is its type, ``message`` its words."""

    rounds: int
    error: str
    message: str


Event: TypeAlias = (
    RunStarted
    | RoundStarted
    | StageStarted
    | TransferProgress
    | SiteLogged
    | SiteFinished
    | AggregationStarted
    | AggregationFinished
    | BestModelSelected
    | RoundFinished
    | Notice
    | RunFinished
    | RunFailed
)
Observer: TypeAlias = Callable[[Event], None]
