"""The loop: plan, charge, exchange, aggregate, finish, evaluate, checkpoint. Every engine runs this one."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from sfl.core import arrays, check, rng
from sfl.core.aggregator import Aggregator
from sfl.core.algorithm import ServerState
from sfl.core.events import (
    Event,
    Observer,
    RoundFinished,
    RunFinished,
    RunStarted,
    SiteFinished,
    StageStarted,
)
from sfl.core.task import EVALUATE, Reply, Status, Task, Update
from sfl.engine.base import Engine
from sfl.errors import BudgetExhausted, CompositionError, RoundError, UpdateError
from sfl.privacy.ledger import Ledger
from sfl.server.job import Job
from sfl.types import Metrics


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run leaves behind. Nothing here can change its numbers.

    Attributes:
        observers: Called with every event, in order.
        save: Called with every new state: the checkpoint.
        ledger: Charged before every exchange that spends privacy.
    """

    observers: Sequence[Observer] = ()
    save: Callable[[ServerState], object] | None = None
    ledger: Ledger = field(default_factory=Ledger)


def federate(job: Job, engine: Engine, *, state: ServerState | None = None, hooks: Hooks | None = None) -> ServerState:
    """Run a job to its last round.

    Args:
        job: From ``Recipe.build()``.
        engine: What carries tasks; it must offer at least ``min_available_clients`` sites.
        state: Where to go on, or ``None`` to begin.
        hooks: Observers, checkpoints and the ledger.

    Returns:
        The last state. It has fewer rounds than planned only if the privacy budget ended the run.

    Raises:
        CompositionError: If the engine has fewer sites than a round needs, or a private job meets more sites than it
            was planned for.
        RoundError: If a round ends with fewer usable replies than ``min_available_clients``.
    """
    return _Run(job, engine, hooks or Hooks()).to_the_end(state)


class _Run:
    def __init__(self, job: Job, engine: Engine, hooks: Hooks) -> None:
        self.job, self.engine, self.hooks = job, engine, hooks
        self.clients = engine.clients()
        planned = job.federation.num_clients
        if job.mechanisms and len(self.clients) > planned:
            raise CompositionError(
                f"num_clients of the federation must count every site under a mechanism, got {planned} "
                f"and an engine with {len(self.clients)}. Set num_clients of the federation."
            )
        minimum = job.federation.min_available_clients
        if len(self.clients) < minimum:
            raise CompositionError(
                f"an engine must offer at least min_available_clients={minimum} sites, got {len(self.clients)}. "
                "Lower it, or give the environment more sites."
            )
        self.sites: list[SiteFinished] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.sent = self.received = 0

    def to_the_end(self, state: ServerState | None) -> ServerState:
        started = time.perf_counter()
        begun = state is None
        state = self._begin() if state is None else state
        self._announce(state)
        reason = ""
        if begun:
            self._close_round(state, {}, evaluate=self.job.evaluate_every > 0)
        while state.round < self.job.federation.num_rounds and not reason:
            try:
                state = self._round(state)
            except BudgetExhausted as stop:
                reason = str(stop)
        self._emit(RunFinished(rounds=state.round, seconds=time.perf_counter() - started, reason=reason))
        return state

    def _begin(self) -> ServerState:
        state = self.job.algorithm.init(self.job.initial())
        return replace(state, mechanisms=self.job.server_chain.init(state.parameters))

    def _announce(self, state: ServerState) -> None:
        self._emit(
            RunStarted(
                job=self.job.name,
                clients=tuple(self.clients),
                rounds=self.job.federation.num_rounds,
                done=state.round,
                num_parameters=arrays.num_parameters(state.parameters),
                nbytes=arrays.nbytes(state.parameters),
                engine=self.engine.describe(),
            )
        )

    def _round(self, state: ServerState) -> ServerState:
        task, cohort = self.job.algorithm.plan(state, self.clients)
        task = replace(task, parameters=arrays.read_only(task.parameters))
        for mechanism in self.job.mechanisms:
            self.hooks.ledger.charge(task.round, mechanism.event(len(cohort), len(self.clients)))
        aggregate, fit = self._gather(task, cohort)
        with self._timed("aggregate"):
            generator = rng.public(self.job.federation.seed, task.round, "server-transform")
            aggregate, mechanisms = self.job.server_chain.apply(aggregate, state.mechanisms, generator)
            del task
            state = replace(self.job.algorithm.finish(state, aggregate), mechanisms=mechanisms)
            del aggregate
        every = self.job.evaluate_every
        last = state.round == self.job.federation.num_rounds
        self._close_round(state, fit, evaluate=every > 0 and (last or state.round % every == 0))
        return state

    def _gather(self, task: Task, cohort: Sequence[str]) -> tuple[Update, Metrics]:
        """One exchange and its aggregate. Time inside the engine is the stage's, the rest is aggregation."""
        mean = _MetricsMean()
        minimum = self.job.federation.min_available_clients
        started, before = time.perf_counter(), self.seconds[task.name]
        try:
            aggregate = _aggregate(self.job.aggregator, mean.watch(self._usable(task, cohort)))
        except RoundError as error:
            if mean.count >= minimum:  # the aggregator's own reason
                raise
            raise RoundError(self._shortfall(task, mean.count, minimum)) from error
        self.seconds["aggregate"] += time.perf_counter() - started - (self.seconds[task.name] - before)
        if mean.count < minimum:
            raise RoundError(self._shortfall(task, mean.count, minimum))
        return aggregate, self.job.derive(mean.result())

    def _usable(self, task: Task, cohort: Sequence[str]) -> Iterator[Update]:
        """The usable updates in site order; every planned site is recorded, whatever became of it."""
        self._emit(StageStarted(round=task.round, stage=task.name, cohort=tuple(cohort)))
        self.sent += len(cohort) * arrays.nbytes(task.parameters)
        replies = self.engine.exchange(task, cohort, self.job.federation.round_timeout or None)
        while True:
            with self._timed(task.name):
                reply = next(replies, None)
            if reply is None:
                return
            reply = _screened(reply, task)
            self.received += reply.nbytes
            self._record(task, reply)
            if reply.update is not None:
                yield reply.update
            del reply  # what it holds is let go before the next site works

    def _record(self, task: Task, reply: Reply) -> None:
        update = reply.update
        finished = SiteFinished(
            round=task.round,
            stage=task.name,
            site=reply.site,
            status=reply.status,
            reason=reply.reason,
            details=reply.details,
            seconds=reply.seconds,
            nbytes=reply.nbytes,
            num_examples=update.weight if update is not None else 0.0,
            metrics=self.job.derive(update.metrics) if update is not None else {},
        )
        self.sites.append(finished)
        self._emit(finished)

    def _close_round(self, state: ServerState, fit: Metrics, *, evaluate: bool) -> None:
        """Evaluate the new global model, say what happened, then checkpoint.

        The figures are written before the checkpoint: a run killed between the two repeats the round, and a resume
        drops figures of rounds that no checkpoint holds.
        """
        evaluation, central = self._evaluate(state) if evaluate else ({}, {})
        self._emit(
            RoundFinished(
                round=state.round,
                fit=fit,
                evaluation=evaluation,
                central=central,
                sites=tuple(self.sites),
                seconds=dict(self.seconds),
                bytes_down=self.sent,
                bytes_up=self.received,
            )
        )
        self.sites, self.sent, self.received = [], 0, 0
        self.seconds.clear()
        if self.hooks.save is not None:
            with self._timed("checkpoint"):
                self.hooks.save(state)

    def _evaluate(self, state: ServerState) -> tuple[Metrics, Metrics]:
        parameters = arrays.read_only(state.parameters)
        task = Task(EVALUATE, state.round, parameters, {"seed": self.job.federation.seed})
        mean = _MetricsMean()
        sent = self.sent
        if self.job.program.share_metrics:
            for _ in mean.watch(self._usable(task, self.clients)):
                pass
        self.sent = sent  # the figure of a round is its training exchange
        central: Metrics = {}
        if self.job.central is not None:
            with self._timed("central"):
                central = self.job.derive(self.job.central(parameters))
        return self.job.derive(mean.result()), central

    def _shortfall(self, task: Task, got: int, minimum: int) -> str:
        unused = [s for s in self.sites if s.stage == task.name and s.status is not Status.USED]
        reasons = [s.reason if s.reason.startswith(s.site) else f"{s.site}: {s.reason or s.status}" for s in unused]
        listed = "\n  ".join(reasons)
        return (
            f"round {task.round} must have at least {minimum} usable updates, got {got} of "
            f"{got + len(reasons)}. Mend the sites below or lower min_available_clients.\n  {listed}"
        )

    def _emit(self, event: Event) -> None:
        for observer in self.hooks.observers:
            observer(event)

    @contextmanager
    def _timed(self, phase: str) -> Generator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started


def _screened(reply: Reply, task: Task) -> Reply:
    """The server's own look: nothing that breaks the contract reaches an aggregator, whoever sent it."""
    update = reply.update
    if reply.status is not Status.USED:
        return replace(reply, update=None)
    try:
        if update is None or update.site != reply.site:
            raise UpdateError(f"{reply.site}: a used reply must hold the site's own update, got {_whose(update)}.")
        check.check_update(update, task.parameters, known_finite=reply.known_finite)
        check.check_metrics(update.site, update.metrics)
    except UpdateError as error:
        return Reply(reply.site, Status.REJECTED, reason=str(error), seconds=reply.seconds)
    return reply


def _whose(update: Update | None) -> str:
    return "none" if update is None else f"that of {update.site!r}"


def _aggregate(aggregator: Aggregator, updates: Iterable[Update]) -> Update:
    if aggregator.needs == "individual":
        updates = [replace(update, delta=arrays.copy(update.delta)) for update in updates]
    return aggregator.aggregate(updates)


class _MetricsMean:
    """Weighted mean of what the used sites reported; a figure that a site left out counts only where it is."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._weights: defaultdict[str, float] = defaultdict(float)

    def watch(self, updates: Iterable[Update]) -> Iterator[Update]:
        for update in updates:
            self.count += 1
            for name, value in update.metrics.items():
                self._sums[name] += update.weight * value
                self._weights[name] += update.weight
            yield update
            del update

    def result(self) -> Metrics:
        return {name: total / self._weights[name] for name, total in self._sums.items()}
