"""Workflows: a job's own order of tasks, for those whom synchronous rounds do not fit.

Three patterns carry tasks: ``broadcast`` to many, ``send`` to one, ``relay`` from one to the next. Each returns at
once; ``wait`` on what it returns waits. They run on every engine, and every planned site still ends as used, failed,
late or rejected, is checked, and is reported.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self, TypeAlias

from sfl.core import arrays
from sfl.core.algorithm import ServerState
from sfl.core.events import Notice
from sfl.core.task import FIT, Reply, Status, Task, Update
from sfl.engine.base import late, owned
from sfl.errors import ConfigError
from sfl.server.replies import MetricsMean, screened
from sfl.server.run import Run
from sfl.server.strategy import step
from sfl.types import Config, Parameters, Scalar

__all__ = ["Pending", "Relay", "Sites", "Workflow"]

Carry: TypeAlias = Callable[[Parameters, Update], Parameters]


class Workflow(ABC):
    """What a server does in a run, in place of an algorithm's rounds. Make it a frozen dataclass, so that it travels.

    Example:
        >>> class Cyclic(Workflow):
        ...     def run(self, sites, state):
        ...         while sites.goes_on(state):
        ...             relay = sites.relay(sites.fit_task(state))
        ...             state = sites.finish_round(state, relay.wait(), relay.parameters)
        ...         return state
    """

    def init(self, parameters: Parameters) -> ServerState:
        """The state before the first round."""
        return ServerState(round=0, parameters=parameters)

    @abstractmethod
    def run(self, sites: Sites, state: ServerState) -> ServerState:
        """Run from ``state`` to the end; a resumed run begins with its last checkpoint.

        Args:
            sites: The sites, and what the run offers.
            state: What has been reached; what the workflow itself must remember belongs into ``state.algorithm``.
        """


class Sites:
    """The sites of a run as a workflow sees them.

    Attributes:
        names: Their names, sorted.
        rounds: Rounds planned in all.
        seed: The federation's seed.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.names: list[str] = list(run.clients)
        self.rounds, self.seed = run.job.federation.num_rounds, run.job.federation.seed
        self._sent: dict[int, _Sent] = {}
        self._trained = Task(FIT, 0, {})  # the last task to train that went out

    def goes_on(self, state: ServerState) -> bool:
        """Whether there are rounds left, and nothing has stopped the run."""
        return state.round < self.rounds and not state.stopped

    def fit_task(self, state: ServerState, **config: Scalar) -> Task:
        """The task to train from ``state`` in the round after it."""
        return self.task(FIT, state.round + 1, state.parameters, **config)

    def task(self, name: str, round: int, parameters: Parameters, **config: Scalar) -> Task:
        """Any task: ``"fit"``, ``"evaluate"``, or a name that the client's ``run_task`` knows."""
        given: Config = {**config, "seed": self.seed}
        return Task(name, round, arrays.read_only(parameters), given)

    def broadcast(self, task: Task, to: Sequence[str] | None = None) -> Pending:
        """Give ``task`` to many sites, by default to all."""
        pending = Pending(self, task)
        pending.begin(self._known(self.names if to is None else to))
        return pending

    def send(self, task: Task, to: str | Sequence[str]) -> Pending:
        """Give ``task`` to one site: the first of ``to`` that does it; the next is asked when one has failed."""
        pending = _Send(self, task, self._known([to] if isinstance(to, str) else to))
        pending.go_on()
        return pending

    def relay(self, task: Task, to: Sequence[str] | None = None, *, carry: Carry | None = None) -> Relay:
        """Give ``task`` to one site after the other, each with what the one before has left; by default to all.

        Args:
            task: The first site's task.
            to: Sites, in their order.
            carry: Makes the next parameters of a site's parameters and its update; by default their sum. A site that
                fails is passed over.
        """
        relay = Relay(self, task, self._known(self.names if to is None else to), carry or added)
        relay.go_on()
        return relay

    def next(self, timeout: float | None = None) -> tuple[Pending, Reply] | None:
        """The next reply to anything that is outstanding, and what it answers.

        Args:
            timeout: Seconds to wait; ``None`` waits for ever.

        Returns:
            ``None`` when nothing is outstanding, or nothing came in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            replies = self._run.engine.replies(left)
            reply = next(replies, None)
            if reply is None:
                return None
            sent = self._sent.get(reply.ticket)
            if sent is None or reply.site not in sent.open:
                continue
            travelled = self._run.travelled(reply)
            reply = owned(screened(reply, sent.task, sent.task.parameters, self._run.job))
            replies.close()  # type: ignore[attr-defined]
            self._close(reply.ticket, reply.site)
            self._run.record(sent.task, reply, travelled)
            sent.pending.take(reply)
            return sent.pending, reply

    def aggregate(self, replies: Sequence[Reply]) -> Update:
        """The job's aggregate of the updates among ``replies``, in the order of the sites' names.

        Raises:
            RoundError: If they are fewer than ``min_available_clients``.
        """
        updates = _updates(replies)
        self._run.check_enough(self._trained, len(updates))
        return self._run.aggregate(updates, self._trained)

    def say(self, text: str) -> None:
        """Tell whoever watches the run."""
        self._run.emit(Notice(text=text))

    def check_enough(self, pending: Pending) -> None:
        """Whether enough of what was answered can be used to make a round.

        Raises:
            RoundError: If they are fewer than ``min_available_clients``.
        """
        self._run.check_enough(pending.task, len(_updates(pending.replies)))

    def finish_round(
        self, state: ServerState, replies: Sequence[Reply], new: Parameters | Update, *, ask_sites: bool = True
    ) -> ServerState:
        """Close a round: evaluate the new model as the job says, tell observers, write the checkpoint.

        Args:
            state: The state before it, with what the workflow remembers.
            replies: What the round's figures are the mean of.
            new: The new global parameters, or the update that leads to them.
            ask_sites: Whether an evaluation asks the sites, too, and so waits for what they are at.

        Returns:
            The state after it.
        """
        job, mean = self._run.job, MetricsMean()
        for _ in mean.watch(_updates(replies)):
            pass
        fit = job.derive(mean.result())
        state = self._run.score_received(state, fit)
        parameters = added(state.parameters, new) if isinstance(new, Update) else new
        state = replace(state, round=state.round + 1, parameters=parameters)
        self._run.sites.sort(key=lambda site: (site.stage, site.site))  # they came in any order
        self._run.finished_aggregation(state, mean.count)
        return self._run.close_round(state, fit, evaluate=job.evaluates(state.round), ask_sites=ask_sites)

    def _known(self, sites: Sequence[str]) -> list[str]:
        unknown = sorted(set(sites) - set(self.names))
        if unknown or not sites or len(set(sites)) != len(sites):
            raise ConfigError(f"sites of a task must be distinct ones of {', '.join(self.names)}, got {list(sites)}.")
        return list(sites)

    def hand_over(self, pending: Pending, task: Task, sites: Sequence[str]) -> int:
        """Send for a pattern; its ticket."""
        task, _ = self._run.lowered(task)
        self._run.announce_task(task, sites)
        self._trained = task if task.name == FIT else self._trained
        ticket = self._run.engine.send(task, sites)
        self._sent[ticket] = _Sent(pending, task, set(sites))
        return ticket

    def let_go(self, pending: Pending, timeout: float | None) -> list[Reply]:
        """Cancel what is outstanding of a pattern; its sites are late."""
        replies: list[Reply] = []
        for ticket, sent in list(self._sent.items()):
            if sent.pending is pending:
                self._run.engine.cancel(ticket)
                replies += [replace(late(site, timeout), ticket=ticket) for site in sorted(sent.open)]
                del self._sent[ticket]
        for reply in replies:
            self._run.record(pending.task, reply)
        return replies

    def default_timeout(self) -> float | None:
        """Seconds that the federation gives a round; ``None`` is no limit."""
        return self._run.job.federation.round_timeout or None

    def _close(self, ticket: int, site: str) -> None:
        self._sent[ticket].open.discard(site)
        if not self._sent[ticket].open:
            del self._sent[ticket]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What a workflow has left outstanding is let go."""
        for ticket in self._sent:
            self._run.engine.cancel(ticket)
        self._sent.clear()


class Pending:
    """Tasks that are under way.

    Attributes:
        task: What was asked.
        replies: What has come, one for each site that is done with it.
    """

    def __init__(self, sites: Sites, task: Task) -> None:
        self._sites, self.task = sites, task
        self.replies: list[Reply] = []
        self._open: set[str] = set()

    @property
    def done(self) -> bool:
        """Whether every site has ended it."""
        return not self._open

    def wait(self, timeout: float | None = None) -> list[Reply]:
        """Wait until it is done; sites that have not answered by then are late.

        Args:
            timeout: Seconds; by default the federation's ``round_timeout``.

        Returns:
            One reply for each site that was asked, in the order of their names.
        """
        timeout = self._sites.default_timeout() if timeout is None else timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._sites.next(left) is None:
                self._end(timeout)
        return sorted(self.replies, key=lambda reply: reply.site)

    def cancel(self) -> None:
        """Let go of what is outstanding: those sites are late."""
        self._end(None)

    def _end(self, timeout: float | None) -> None:
        self.replies += self._sites.let_go(self, timeout)
        self._open.clear()

    def begin(self, sites: Sequence[str], task: Task | None = None) -> None:
        """Hand the task to ``sites``."""
        self._open |= set(sites)
        self._sites.hand_over(self, task or self.task, sites)

    def take(self, reply: Reply) -> None:
        """A site has ended its part."""
        self._open.discard(reply.site)
        self.replies.append(reply)


class _Send(Pending):
    """One task for the first site that does it."""

    def __init__(self, sites: Sites, task: Task, to: Sequence[str]) -> None:
        super().__init__(sites, task)
        self._left = list(to)

    def go_on(self) -> None:
        """Ask the next site."""
        self.begin([self._left.pop(0)])

    def take(self, reply: Reply) -> None:
        """Be done with it, or ask the next."""
        super().take(reply)
        if reply.status is not Status.USED and self._left:
            self.go_on()


class Relay(_Send):
    """A task that goes from site to site.

    Attributes:
        parameters: As the last site that did it has left them.
    """

    def __init__(self, sites: Sites, task: Task, to: Sequence[str], carry: Carry) -> None:
        super().__init__(sites, task, to)
        self.parameters, self._carry = task.parameters, carry

    def go_on(self) -> None:
        """Hand what there is to the next site."""
        self.begin([self._left.pop(0)], replace(self.task, parameters=arrays.read_only(self.parameters)))

    def take(self, reply: Reply) -> None:
        """Carry the site's update on."""
        Pending.take(self, reply)
        if reply.update is not None:
            self.parameters = self._carry(self.parameters, reply.update)
        if self._left:
            self.go_on()

    def _end(self, timeout: float | None) -> None:
        """Sites that it has not come to are late, too."""
        super()._end(timeout)
        self.replies += [late(site, timeout) for site in self._left]
        self._left.clear()


@dataclass(slots=True)
class _Sent:
    pending: Pending
    task: Task
    open: set[str]


def _updates(replies: Sequence[Reply]) -> list[Update]:
    """What can be used of replies, in the order of the sites' names: sums must not depend on who was first."""
    return [reply.update for reply in sorted(replies, key=lambda reply: reply.site) if reply.update is not None]


def added(parameters: Parameters, update: Update) -> Parameters:
    """Parameters plus an update; arrays that the site did not send stay as they are."""
    delta = update.delta
    return {
        name: step(before, delta[name].copy(), 1.0) if name in delta else before for name, before in parameters.items()
    }
