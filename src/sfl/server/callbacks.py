"""Callbacks: code of a job's own that is called at named moments of a run, in the server's process.

A moment is an event of ``sfl.core.events``; the method that hears of it has the event's name. Callbacks travel with the
recipe, so they are plain configuration (frozen dataclasses); what they remember lies in ``run.memory`` and is
checkpointed. To only watch a run from the user's own process, pass an observer to ``execute`` instead.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable as Function
from dataclasses import dataclass
from typing import Any

from sfl.core import events
from sfl.core.algorithm import ServerState
from sfl.core.moments import check_moments
from sfl.errors import ConfigError
from sfl.server.selection import is_better, lower_is_better
from sfl.types import Parameters, StateTree
from sfl.utils.memory import trim

__all__ = ["Callback", "EarlyStopping", "RunView", "TrimMemory"]


@dataclass(frozen=True, slots=True)
class RunView:
    """What a callback sees of a run, at one moment.

    Attributes:
        job: The recipe's name.
        clients: All sites, in order.
        rounds: Rounds planned in all.
        state: The server's state: the global parameters (read-only) and what else a checkpoint holds.
        memory: What this callback remembers: numbers, strings, arrays, in dicts and lists. It is checkpointed after
            the round, and there again after a resume.
        stop: Ends the run after this round, for a reason that people read; a resume does not go on past it.
    """

    job: str
    clients: tuple[str, ...]
    rounds: int
    state: ServerState
    memory: dict[str, StateTree]
    stop: Function[[str], None]

    @property
    def parameters(self) -> Parameters:
        """The global parameters, read-only."""
        return self.state.parameters


class Callback:
    """Override the moments that matter; each is given the run and the event. What a callback raises ends the run.

    Example:
        >>> class Tell(Callback):
        ...     def on_best_model_selected(self, run, event):
        ...         print(f"round {event.round} is best")

    Raises:
        TypeError: As a subclass is made whose ``on_...`` method is none of a known moment.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_moments(cls, Callback)

    def on_run_started(self, run: RunView, event: events.RunStarted) -> None:
        """The run begins, or goes on."""

    def on_round_started(self, run: RunView, event: events.RoundStarted) -> None:
        """A round is planned; nothing has been sent."""

    def on_stage_started(self, run: RunView, event: events.StageStarted) -> None:
        """A task goes out."""

    def on_transfer_progress(self, run: RunView, event: events.TransferProgress) -> None:
        """A large model or update is on its way."""

    def on_site_finished(self, run: RunView, event: events.SiteFinished) -> None:
        """A site has ended a task, in whatever way."""

    def on_site_logged(self, run: RunView, event: events.SiteLogged) -> None:
        """A site's code has logged something."""

    def on_aggregation_started(self, run: RunView, event: events.AggregationStarted) -> None:
        """The aggregator is given its first update."""

    def on_aggregation_finished(self, run: RunView, event: events.AggregationFinished) -> None:
        """There is a new global model."""

    def on_best_model_selected(self, run: RunView, event: events.BestModelSelected) -> None:
        """A model is the best so far."""

    def on_round_finished(self, run: RunView, event: events.RoundFinished) -> None:
        """A round is over, its checkpoint comes next. Round 0 holds the evaluation before the first."""

    def on_notice(self, run: RunView, event: events.Notice) -> None:
        """Something that a person should know."""

    def on_run_finished(self, run: RunView, event: events.RunFinished) -> None:
        """The run is over."""

    def on_run_failed(self, run: RunView, event: events.RunFailed) -> None:
        """The run ends with an error."""


def _moment(event: type) -> str:
    return "on_" + re.sub(r"(?<=.)(?=[A-Z])", "_", event.__name__).lower()


_BY_EVENT = {event: _moment(event) for event in events.Event.__args__}


def tell(callback: Callback, run: RunView, event: events.Event) -> None:
    """Call the method of the event's moment."""
    getattr(callback, _BY_EVENT[type(event)])(run, event)


@dataclass(frozen=True, kw_only=True)
class EarlyStopping(Callback):
    """Ends a run once a figure has not improved for some rounds (Prechelt 1998, criterion UP in its simplest form).

    Attributes:
        metric: A figure of the global held-out data, else of the sites', else of training.
        patience: Rounds without an improvement that end the run.
        min_delta: What counts as an improvement: more than this.
        mode: ``"min"``, ``"max"``, or ``"auto"``: lower is better for losses and errors, higher for all else.
    """

    metric: str = "loss"
    patience: int = 3
    min_delta: float = 0.0
    mode: str = "auto"

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_delta < 0 or self.mode not in ("auto", "min", "max"):
            raise ConfigError(
                "EarlyStopping must have patience >= 1, min_delta >= 0 and mode auto, min or max, "
                f"got {self.patience}, {self.min_delta}, {self.mode!r}."
            )

    def on_round_finished(self, run: RunView, event: events.RoundFinished) -> None:
        """Compare the round with the best one."""
        figures = {**event.fit, **event.evaluation, **event.central}
        if event.round == 0 or self.metric not in figures:
            return
        lower = lower_is_better(self.metric) if self.mode == "auto" else self.mode == "min"
        value, best = figures[self.metric], run.memory.get("best")
        margin = self.min_delta if lower else -self.min_delta
        if not isinstance(best, float) or is_better(value + margin, best, lower=lower):
            run.memory.update(best=value, round=event.round)
        elif event.round - int(str(run.memory["round"])) >= self.patience:
            run.stop(f"{self.metric} has not improved on {best:.6g} of round {run.memory['round']} since")


@dataclass(frozen=True)
class TrimMemory(Callback):
    """Gives the server's memory back.

    Attributes:
        every: After each n-th round.
    """

    every: int = 1

    def on_round_finished(self, run: RunView, event: events.RoundFinished) -> None:  # noqa: ARG002
        """Collect, and give back."""
        if event.round % self.every == 0:
            gc.collect()
            trim()
