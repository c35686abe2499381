"""The one seam to the outside: how a task reaches sites and replies come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from sfl.core.task import Reply, Status, Task


class Engine(ABC):
    """Carries tasks and replies. It can carry synchronous rounds, relays, several-step protocols and asynchrony.

    ``send`` and ``replies`` are the primitives; ``exchange`` is the synchronous round built on them.
    """

    @abstractmethod
    def clients(self) -> list[str]:
        """Names of the sites that are there, sorted."""

    @abstractmethod
    def send(self, task: Task, clients: Sequence[str]) -> None:
        """Hand ``task`` to each of ``clients``. May return before any has begun."""

    @abstractmethod
    def replies(self, timeout: float | None = None) -> Iterator[Reply]:
        """Replies to what was sent, in order of arrival, until none is outstanding or ``timeout`` seconds are over.

        The arrays of an update may be lent: valid until the next reply is drawn.
        """

    def exchange(self, task: Task, cohort: Sequence[str], timeout: float | None = None) -> Iterator[Reply]:
        """Send to all of ``cohort``; yield exactly one reply for each, in the order of ``cohort``.

        Sites that have not answered within ``timeout`` are late. An engine whose replies arrive in the order in which
        it was given the sites (the local one) streams; for others, early arrivals wait for their turn.
        """
        self.send(task, cohort)
        waiting: dict[str, Reply] = {}
        position = 0
        for reply in self.replies(timeout):
            waiting[reply.site] = reply
            while position < len(cohort) and cohort[position] in waiting:
                yield waiting.pop(cohort[position])
                position += 1
        for site in cohort[position:]:
            late = Reply(site, Status.LATE, reason=f"no reply within {timeout} s", seconds=timeout or 0.0)
            yield waiting.pop(site, late)

    @abstractmethod
    def describe(self) -> str:
        """The engine in words, for the first line of a run."""

    def close(self) -> None:
        """Release processes and memory. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
