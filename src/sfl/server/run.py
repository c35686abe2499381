"""What every way of running a job needs: exchanges that leave no reply out, events, evaluations, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from sfl.core import arrays, quantise, sparse
from sfl.core.algorithm import Algorithm, ServerState
from sfl.core.events import (
    AggregationFinished,
    AggregationStarted,
    BestModelSelected,
    Event,
    Notice,
    Observer,
    RoundFinished,
    RunStarted,
    SiteFinished,
    SiteLogged,
    StageStarted,
    TransferProgress,
)
from sfl.core.task import (
    EVALUATE,
    EXAMPLE_EPSILON,
    FIT,
    NUM_UPDATES,
    SERVER,
    SIMULATED_SECONDS,
    SPENT,
    Reply,
    Status,
    Task,
    Update,
)
from sfl.core.unpack import is_packed
from sfl.engine.base import Engine
from sfl.engine.kit import kit_of_server
from sfl.errors import BudgetExhausted, CompositionError, ConfigError, RoundError
from sfl.privacy.ledger import PrivacyLedger
from sfl.server.callbacks import RunView, tell
from sfl.server.job import Job
from sfl.server.messages import lowered
from sfl.server.replies import MetricsMean, aggregated, screened
from sfl.server.secure import gathered
from sfl.types import Metrics, Parameters, StateTree

_GRID = 0.01  # by which an upper bound on ε may fall on another grid of losses


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
    ledger: PrivacyLedger = field(default_factory=PrivacyLedger)


class Run:
    """One run of a job over an engine.

    Raises:
        CompositionError: If the engine's sites are too few, or too many for a private job.
    """

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
        self._memories: list[dict[str, StateTree]] = [{} for _ in job.callbacks]
        self._state: ServerState | None = None
        self._stopped = ""
        self._examples: dict[str, float] = {}
        self._aggregator: StateTree = None
        self.secure: StateTree = None
        kit = kit_of_server()
        if job.program.secure is not None and kit is not None:
            job.program.secure.check_server(kit)
        engine.watch(self._moving)

    def begin(self, state: ServerState | None) -> ServerState:
        """The state to start from: the given one, or round 0, evaluated and saved. Announces the run."""
        begun = state is None
        if state is None:
            state = self.job.algorithm.init(self.job.initial())
            carried = self.job.program.rule.carried(dict(state.parameters))
            sent = self.job.program.chain.sends(carried)
            remembers = self.job.aggregator.init(carried)
            secure = self.job.program.secure
            model = dict(state.parameters)
            begun_secure = secure.begin(model, sent, self.clients) if secure is not None else None
            chain = self.job.server_chain.init(sent)
            state = replace(state, mechanisms=chain, aggregator=remembers, secure=begun_secure)
        else:
            self._require_same_kind(state)
        self._aggregator, self.secure = state.aggregator, state.secure
        if state.engine is not None:
            self.engine.recall(state.engine)
        for memory, kept in zip(self._memories, state.callbacks, strict=False):
            memory.update(copy.deepcopy(kept) if isinstance(kept, dict) else {})
        self._examples = said_of_examples(state)
        if isinstance(self.job.algorithm, Algorithm):
            state = self.job.algorithm.joined(state, self.clients)
        self.look_at(state)
        self._announce(state)
        return self.close_round(state, {}, evaluate=self.job.evaluates(state.round)) if begun else state

    def _require_same_kind(self, state: ServerState) -> None:
        """What the mechanisms remember must be of these mechanisms.

        Raises:
            ConfigError: If the run was begun with others, or by a version of SFL that kept something else.
        """
        if (state.secure is None) != (self.job.program.secure is None):
            raise ConfigError(
                "a run must go on with secure aggregation, or without, as it was begun, got the other. Give the same "
                "options, or start a new run."
            )
        carried = self.job.program.rule.carried(self.job.model_like(state.parameters))
        fresh = self.job.server_chain.init(self.job.program.chain.sends(carried))
        if [_kind(one) for one in fresh] != [_kind(one) for one in state.mechanisms]:
            raise ConfigError(
                "a run must go on with the mechanisms that it was begun with, got a checkpoint of others. "
                "Give the same options, or start a new run."
            )

    def _announce(self, state: ServerState) -> None:
        self.emit(
            RunStarted(
                job=self.job.name,
                clients=tuple(self.clients),
                rounds=self.job.federation.num_rounds,
                done=state.round,
                num_parameters=arrays.num_parameters(self.job.model_like(state.parameters)),
                nbytes=arrays.nbytes(state.parameters),
                engine=self.engine.describe(),
            )
        )

        for line in self.job.secure_lines():
            self.emit(Notice(text=line))

    def look_at(self, state: ServerState) -> None:
        """What callbacks see from now on."""
        if self.job.callbacks:
            self._state = replace(state, parameters=arrays.read_only(state.parameters))

    def gather(self, task: Task, cohort: Sequence[str]) -> tuple[Update, Metrics]:
        """One exchange and its aggregate. Time inside the engine is the stage's, the rest is aggregation.

        Raises:
            RoundError: If fewer than ``min_available_clients`` sites sent what can be used.
        """
        if self.job.program.secure is not None:
            return gathered(self, self.job.program.secure, task, cohort)
        mean = MetricsMean()
        started, before = time.perf_counter(), self.seconds[task.name]
        updates = self._began(task, mean.watch(self.usable(task, cohort)))
        try:
            aggregate = self.aggregate(updates, task)
        except RoundError:
            if self._sums_nothing(cohort, mean.count):
                return Update(SERVER, _zeros(self.job.program.sends(task)), 0.0), {}
            self.check_enough(task, mean.count)
            raise
        self.seconds["aggregate"] += time.perf_counter() - started - (self.seconds[task.name] - before)
        if not self._may_be_few(cohort):
            self.check_enough(task, mean.count)
        figures = {} if self._hides_updates else aggregate.metrics
        aggregate = self.as_the_round_has_it(replace(aggregate, metrics=figures), task, mean.count)
        return aggregate, self.job.derive({**mean.result(), **figures})

    def as_the_round_has_it(self, aggregate: Update, task: Task, count: int) -> Update:
        """An aggregate with what follows from the round: arrays that nobody sent, or the number of its updates."""
        if not self.job.server_chain.transforms:
            return replace(aggregate, metrics={**aggregate.metrics, NUM_UPDATES: float(count)})
        expected = self.job.program.sends(task)  # a name that nobody sent is noised, too: which were sent must not show
        whole = _zeros(expected) | aggregate.delta
        return replace(aggregate, delta={name: whole[name] for name in expected})

    def lowered(self, task: Task, memory: StateTree = None, *, remembers: bool = False) -> tuple[Task, StateTree]:
        """The task as the federation's messages carry it, and what that leaves out; see ``server.messages``."""
        form = self.job.federation.message_dtype
        if form == quantise.FLOAT32 or task.name not in (FIT, EVALUATE):
            return task, None
        with self.timed("quantise"):
            return lowered(task, form, memory, remembers=remembers)

    def aggregate(self, updates: Iterable[Update], task: Task) -> Update:
        """The job's aggregate of updates that answer ``task``; what the aggregator remembers goes into the state."""
        aggregate, self._aggregator = aggregated(self.job.aggregator, updates, task, self._aggregator)
        return aggregate

    def _may_be_few(self, cohort: Sequence[str]) -> bool:
        """Whether fewer updates than the minimum make a round: few were drawn, or, under a mechanism, any sample was
        drawn: whether somebody in it failed must not show.
        """
        few = len(cohort) < self.job.federation.min_available_clients
        return self.job.federation.sampling == "poisson" and (few or bool(self.job.mechanisms))

    def _sums_nothing(self, cohort: Sequence[str], count: int) -> bool:
        """Whether a sum of no updates is what was asked for."""
        return count == 0 and self._may_be_few(cohort) and (not cohort or bool(self.job.mechanisms))

    def check_enough(self, task: Task, count: int) -> None:
        """Whether ``count`` usable updates make a round.

        Raises:
            RoundError: If not, with what became of the others.
            BudgetExhausted: If sites may train no more.
        """
        if count >= self.job.federation.min_available_clients:
            return
        spent = [site.reason for site in self.sites if site.stage == task.name and SPENT in site.reason]
        if spent:
            raise BudgetExhausted(f"too few sites may train on: {spent[0]}")
        raise RoundError(self._shortfall(task, count))

    def finished_aggregation(self, state: ServerState, count: int) -> None:
        """Say that there is a new global model."""
        self.look_at(state)
        self.emit(AggregationFinished(round=state.round, num_updates=count))

    def _began(self, task: Task, updates: Iterator[Update]) -> Iterator[Update]:
        has_begun = False  # counting with enumerate would keep each update while the next is waited for
        for update in updates:
            if not has_begun:
                self.emit(AggregationStarted(round=task.round))
            has_begun = True
            yield update
            del update

    def usable(self, task: Task, cohort: Sequence[str]) -> Iterator[Update]:
        """The usable updates in site order; every planned site is recorded, whatever became of it."""
        self.announce_task(task, cohort)
        expected = self.job.program.sends(replace(task, parameters=self.job.model_like(task.parameters)))
        federation = self.job.federation
        enough = federation.wait_for if task.name != EVALUATE else 0
        replies = self.engine.exchange(task, cohort, federation.round_timeout or None, enough=enough)
        while True:
            started = time.perf_counter()
            try:
                reply = next(replies, None)
            finally:
                self.seconds[task.name] += time.perf_counter() - started
            if reply is None:
                return
            travelled = self.travelled(reply)
            reply = self._with_figures(self.counted_on(screened(reply, task, expected, self.job), task), task)
            self.record(task, reply, travelled)
            if reply.update is not None:
                yield reply.update
            del reply  # what it holds is let go before the next site works

    @property
    def _hides_updates(self) -> bool:
        """Whether single updates are protected by noise on their sum alone: then nothing that follows from one of them,
        such as how many of its coordinates are not zero, may stand among the figures.
        """
        return self.job.program.secure is not None or any(mechanism.on_sum for mechanism in self.job.mechanisms)

    def counted_on(self, reply: Reply, task: Task) -> Reply:
        """A site whose ledger has forgotten what it spent on its examples is not used: its ε would start anew."""
        update, before = reply.update, self._examples.get(reply.site, 0.0)
        if update is None or task.name != FIT or self.job.program.example_budget is None:
            return reply
        said = update.metrics.get(EXAMPLE_EPSILON, math.nan)
        if said >= before * (1.0 - _GRID):
            return reply
        reason = (
            f"{reply.site}: its own ledger must go on from the ε = {before:.3g} that it has told, got {said:.3g}. "
            "It was lost or emptied: put it back, or start a new run."
        )
        return Reply(reply.site, Status.REJECTED, reason=reason)

    def _with_figures(self, reply: Reply, task: Task) -> Reply:
        """What the chain's transforms say of an update that arrived, among the site's figures."""
        update = reply.update
        if update is None or task.name != FIT or self._hides_updates:
            return reply
        figures = self.job.program.chain.figures(update)
        return replace(reply, update=replace(update, metrics={**update.metrics, **figures})) if figures else reply

    def announce_task(self, task: Task, cohort: Sequence[str], nbytes: int | None = None) -> None:
        """A task goes out, in so many bytes if it is not the same for all; the figure of a round is what it sends to
        train.
        """
        self.emit(StageStarted(round=task.round, stage=task.name, cohort=tuple(cohort)))
        if task.name != EVALUATE:
            self.sent += len(cohort) * arrays.nbytes(task.travels) if nbytes is None else nbytes

    def travelled(self, reply: Reply) -> int:
        """Bytes of a reply that its site has packed; 0 if it has come as floats."""
        if reply.update is None or self.job.federation.message_dtype == quantise.FLOAT32:
            return 0
        return arrays.nbytes(reply.update.delta) if is_packed(reply.update.delta) else 0

    def _nbytes(self, update: Update | None, travelled: int) -> int:
        """Bytes of an update as it has come, or would have over a wire: whole arrays where more may not be told."""
        if update is None:
            return 0
        if self.job.program.secure is not None:
            return arrays.nbytes(update.delta)
        if travelled:
            whole = quantise.nbytes(update.delta, self.job.federation.message_dtype)
            return whole if self._hides_updates else travelled
        # only what a filter made has zeros that do not travel
        filtered = bool(self.job.program.chain.transforms) and not self._hides_updates
        return (sparse.nbytes if filtered else arrays.nbytes)(update.delta)

    def record(self, task: Task, reply: Reply, travelled: int = 0) -> None:
        """Note and say how a planned site ended a task, and in how many bytes of codes its reply came."""
        update = reply.update
        nbytes = self._nbytes(update, travelled)
        self.received += nbytes
        if reply.logs:
            self.emit(SiteLogged(round=task.round, site=reply.site, lines=reply.logs))
        finished = SiteFinished(
            round=task.round,
            stage=task.name,
            site=reply.site,
            status=reply.status,
            reason=reply.reason,
            details=reply.details,
            seconds=reply.seconds,
            nbytes=nbytes,
            num_examples=update.weight if update is not None else 0.0,
            metrics=self.job.derive(update.metrics) if update is not None else {},
        )
        self.sites.append(finished)
        if EXAMPLE_EPSILON in finished.metrics:
            self._examples[reply.site] = finished.metrics[EXAMPLE_EPSILON]
        self.emit(finished)

    def score_received(self, state: ServerState, fit: Metrics) -> ServerState:
        """What sites report as they train may describe the model that they were sent."""
        return self._scored(state, fit) if self.job.selection.received else state

    def _scored(self, state: ServerState, figures: Metrics) -> ServerState:
        best = self.job.selection.better(state.best, state.round, figures)
        if not isinstance(best, dict):
            return state
        self.emit(BestModelSelected(round=state.round, metric=str(best["metric"]), value=figures[str(best["metric"])]))
        return replace(state, best=best)

    def close_round(self, state: ServerState, fit: Metrics, *, evaluate: bool, ask_sites: bool = True) -> ServerState:
        """Evaluate the new global model, on the sites too if they are asked, say what happened, then checkpoint.

        The figures are written before the checkpoint: a run killed between the two repeats the round, and a resume
        drops figures of rounds that no checkpoint holds.
        """
        self.look_at(state)
        evaluation, central = self._evaluate(state, ask_sites=ask_sites) if evaluate else ({}, {})
        state = self._scored(state, {**evaluation, **central})
        self.look_at(state)
        simulated = self.engine.simulated_seconds()
        fit = fit if simulated is None else {**fit, SIMULATED_SECONDS: simulated}
        self.emit(
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
        state = replace(
            state,
            aggregator=self._aggregator,
            engine=self.engine.remembers(),
            callbacks=copy.deepcopy(self._memories),
            stopped=self._stopped,
            secure=self.secure,
            examples=dict(self._examples) if self.job.program.example_budget is not None else None,
        )
        if self.hooks.save is not None:
            with self.timed("checkpoint"):
                self.hooks.save(state)
        return state

    def _evaluate(self, state: ServerState, *, ask_sites: bool) -> tuple[Metrics, Metrics]:
        parameters = arrays.read_only(state.parameters)
        mean = MetricsMean()
        if self.job.program.share_metrics and ask_sites:
            task, _ = self.lowered(Task(EVALUATE, state.round, parameters, {"seed": self.job.federation.seed}))
            for _ in mean.watch(self.usable(task, self.clients)):
                pass
        central: Metrics = {}
        if self.job.central is not None:
            with self.timed("central"):
                central = self.job.derive(self.job.central(parameters))
        return self.job.derive(mean.result()), central

    def _shortfall(self, task: Task, got: int) -> str:
        minimum = self.job.federation.min_available_clients
        unused = sum(s.stage == task.name and s.status is not Status.USED for s in self.sites)
        return self.with_reasons(
            f"round {task.round} must have at least {minimum} usable updates, got {got} of {got + unused}. Mend the "
            "sites below or lower min_available_clients."
        )

    def with_reasons(self, text: str) -> str:
        """The text, and below it why sites were not used in this round."""
        unused = [s for s in self.sites if s.stage != EVALUATE and s.status is not Status.USED]
        reasons = [s.reason if s.reason.startswith(s.site) else f"{s.site}: {s.reason or s.status}" for s in unused]
        return "\n  ".join([text, *dict.fromkeys(reasons)])

    def _moving(self, event: TransferProgress) -> None:
        """How far a large transfer is. How long a protected update is tells how much of it is zero."""
        if event.direction == "down" or not self._hides_updates:
            self.emit(event)

    def emit(self, event: Event) -> None:
        """Tell observers, then callbacks."""
        for observer in self.hooks.observers:
            observer(event)
        if self._state is not None:
            for callback, memory in zip(self.job.callbacks, self._memories, strict=True):
                rounds = self.job.federation.num_rounds
                view = RunView(self.job.name, tuple(self.clients), rounds, self._state, memory, self._stop)
                tell(callback, view, event)

    def _stop(self, reason: str) -> None:
        self._stopped = self._stopped or reason

    @contextmanager
    def timed(self, phase: str) -> Generator[None]:
        """Add the time of a block to a phase of the round."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started


def said_of_examples(state: ServerState | None) -> dict[str, float]:
    """What the sites' own ledgers have last said of their examples' ε."""
    if state is None or not isinstance(state.examples, dict):
        return {}
    return {site: float(str(epsilon)) for site, epsilon in state.examples.items()}


def _kind(state: StateTree) -> object:
    return sorted(state) if isinstance(state, dict) else type(state)


def _zeros(parameters: Parameters) -> Parameters:
    """As wide as what is noised, so that rounding does not show which arrays somebody sent."""
    return {name: np.zeros(value.shape) for name, value in parameters.items()}
