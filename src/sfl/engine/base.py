"""The one seam to the outside: how a task reaches sites and replies come back."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import TracebackType
from typing import Self

from sfl.core import arrays
from sfl.core.events import TransferProgress
from sfl.core.task import END, Reply, Status, Task
from sfl.types import StateTree

_LONG = 1e6  # seconds; what a clock of 32 bits of milliseconds can wait for


class Engine(ABC):
    """Carries tasks and replies. It can carry synchronous rounds, relays, several-step protocols and asynchrony.

    ``send``, ``replies`` and ``cancel`` are the primitives; ``exchange`` is the synchronous round built on them.
    Several sends may be outstanding at a time; a site does its tasks one by one, in the order in which they were sent.
    """

    @abstractmethod
    def clients(self) -> list[str]:
        """Names of the sites that are there, sorted."""

    @abstractmethod
    def send(self, task: Task, clients: Sequence[str]) -> int:
        """Hand ``task`` to each of ``clients``. May return before any has begun.

        Returns:
            A ticket: the number that every reply to this task carries.
        """

    @abstractmethod
    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        """Replies in order of arrival, until none is outstanding or ``timeout`` seconds are over.

        The arrays of an update may be lent: valid until the next reply is drawn.

        Args:
            timeout: Seconds to wait in all; ``None`` waits for ever.
            ticket: Draw replies to this send alone, and leave others for later; ``None`` draws all.
        """

    @abstractmethod
    def cancel(self, ticket: int) -> None:
        """Let go of what is outstanding of a send: sites may leave it undone, replies that come are dropped."""

    def incoming(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        """Like ``replies``, but what is large may still lie at its site, until ``drawn`` brings it."""
        return self.replies(timeout, ticket=ticket)

    def drawn(self, reply: Reply, timeout: float | None = None) -> Reply:  # noqa: ARG002
        """The whole reply, of one that has arrived; each part of it may take ``timeout`` seconds."""
        return reply

    def watch(self, listener: Callable[[TransferProgress], object]) -> None:  # noqa: B027 - most have nothing to tell
        """Call ``listener`` as large transfers go on."""

    def present(self, at_least: int) -> list[str]:  # noqa: ARG002
        """Sites that could begin a task now, sorted; it may wait until there are ``at_least`` so many."""
        return self.clients()

    def remembers(self) -> StateTree:
        """What a run that goes on must know of this engine; goes into its checkpoint."""
        return None

    def recall(self, state: StateTree) -> None:  # noqa: B027 - most have nothing to recall
        """Go on from what an engine of this kind remembered."""

    def simulated_seconds(self) -> float | None:
        """Simulated time since the run began; ``None`` where time is real."""
        return None

    def exchange(
        self, task: Task, cohort: Sequence[str], timeout: float | None = None, *, enough: int = 0
    ) -> Iterator[Reply]:
        """Send to all of ``cohort``; yield exactly one reply for each, in the order of ``cohort``.

        Sites that have not answered within ``timeout``, or before ``enough`` others sent an update (0 waits for all),
        are late. An engine whose replies arrive in the order in which
        it was given the sites (the local one) streams; for others, early arrivals wait for their turn, as copies. What
        arrives from a site outside the cohort, or a second time from one, is not part of the round.
        """
        yield from self._in_order({self.send(task, cohort)}, cohort, timeout, enough)

    def exchange_each(self, tasks: Mapping[str, Task], timeout: float | None = None) -> Iterator[Reply]:
        """The same with a task for each site; sites that are given the same object are sent one task together."""
        together: dict[int, tuple[Task, list[str]]] = {}
        for site, task in tasks.items():
            together.setdefault(id(task), (task, []))[1].append(site)
        tickets = {self.send(task, sites) for task, sites in together.values()}
        together.clear()
        yield from self._in_order(tickets, list(tasks), timeout, 0)

    def _in_order(
        self, tickets: Set[int], cohort: Sequence[str], timeout: float | None, enough: int
    ) -> Iterator[Reply]:
        """One reply to these tickets from each site of the cohort, in its order; see ``exchange``."""
        ticket = next(iter(tickets)) if len(tickets) == 1 else None
        try:
            open_sites = dict.fromkeys(cohort)
            waiting: dict[str, Reply] = {}
            used = 0
            # without a limit, replies may come in the order of the cohort: then nobody could be late
            for reply in self.incoming(_LONG if enough and timeout is None else timeout, ticket=ticket):
                if reply.site not in open_sites or reply.site in waiting or not (ticket or reply.ticket in tickets):
                    continue
                in_turn = reply.site == next(iter(open_sites))
                waiting[reply.site] = reply if in_turn else owned(reply)
                while (site := next(iter(open_sites), None)) in waiting:
                    del open_sites[site]
                    yield self.drawn(waiting.pop(site), timeout)
                used += reply.status is Status.USED
                del reply  # what it holds is let go before the next is drawn
                if 0 < enough <= used or not open_sites:
                    break
            for site in open_sites:
                there = site in waiting
                yield (
                    self.drawn(waiting.pop(site), timeout) if there else _missing(site, timeout, used if enough else 0)
                )
        finally:
            for one in tickets:
                self.cancel(one)

    def end_sites(self, seconds: float) -> None:
        """Tell all sites, wherever they are, that the run is over, so that their clients end what they began."""
        for reply in self.exchange(Task(END, 0, {}), self.clients(), seconds):
            if reply.status is Status.FAILED:
                logging.getLogger(__name__).warning("at its end, %s", reply.reason)

    @abstractmethod
    def describe(self) -> str:
        """The engine in words, for the first line of a run."""

    def close(self) -> None:  # noqa: B027 - an engine that holds nothing has nothing to release
        """Release processes and memory. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def owned(reply: Reply) -> Reply:
    """The reply with arrays of its own: lent ones are overwritten when the next is drawn."""
    if reply.update is None:
        return reply
    update = dataclasses.replace(reply.update, delta=arrays.copy(reply.update.delta))
    return dataclasses.replace(reply, update=update)


def _missing(site: str, timeout: float | None, used: int) -> Reply:
    return late(site, timeout) if not used else Reply(site, Status.LATE, reason=f"later than {used} others")


def late(site: str, timeout: float | None) -> Reply:
    """The reply of a site that has not answered in time."""
    reason = "no reply" if timeout is None else f"no reply within {timeout:g} s"
    return Reply(site, Status.LATE, reason=reason, seconds=timeout or 0.0)
