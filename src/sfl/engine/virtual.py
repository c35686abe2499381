"""An engine whose replies arrive in simulated time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfl.core import arrays
from sfl.core.events import TransferProgress
from sfl.core.task import EVALUATE, Reply, Task
from sfl.engine.base import Engine
from sfl.engine.clock import SiteProfile
from sfl.types import StateTree

_MOMENTS = 50  # arrivals of each site that are looked at for one at which enough are there


class VirtualEngine(Engine):
    """Carries tasks on another engine, and says in which order and when they would be done.

    A site begins a task once it is done with those before and is there; the task's arrays go down, it works, its
    arrays go up. Evaluations and other tasks take no time. Waiting costs none either: the clock jumps to the next
    reply. A site that is late has been told to stop, and does not do its task at all.

    Args:
        inner: Does the work, when a reply is drawn.
        profiles: By site.
    """

    def __init__(self, inner: Engine, profiles: Mapping[str, SiteProfile]) -> None:
        self._inner, self._profiles = inner, profiles
        self._now = 0.0
        self._last = 0
        self._flying: list[_Flying] = []
        self._free: dict[str, float] = {}  # when a site is done with what it was given
        self._promised: dict[str, float] = {}  # when those were to be done who trained as a run was left

    def clients(self) -> list[str]:
        """Names of the sites, sorted."""
        return self._inner.clients()

    def present(self, at_least: int) -> list[str]:
        """Those who are there; the clock goes on until there are ``at_least`` so many, or, where hours never overlap so
        far, to when most of them are there.
        """
        names = self.clients()
        best: tuple[int, float] = (-1, self._now)
        later = self._now
        for _ in range(_MOMENTS * len(names)):
            there = [name for name in names if self._profiles[name].is_online(later)]
            if len(there) > best[0]:
                best = (len(there), later)
            if len(there) >= min(at_least, len(names)):
                break
            later = min(self._profiles[name].next_online(later) for name in names if name not in there)
        self._now = best[1]
        return [name for name in names if self._profiles[name].is_online(self._now)]

    def send(self, task: Task, clients: Sequence[str]) -> int:
        """Hand the task over, and work out when each site will be done."""
        self._last += 1
        for site in clients:
            self._flying.append(_Flying(self._done_at(task, site), self._last, site, self._inner.send(task, [site])))
        return self._last

    def _done_at(self, task: Task, site: str) -> float:
        profile = self._profiles[site]
        if task.name == EVALUATE or not task.parameters:
            return self._now
        promised = self._promised.pop(site, None)
        begins = profile.next_online(max(self._now, self._free.get(site, 0.0)))
        travels = 2.0 * arrays.nbytes(task.travels) / profile.bandwidth
        done = begins + travels + profile.seconds if promised is None else promised
        self._free[site] = done
        return done

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        """Replies in the order in which they arrive in simulated time; ``timeout`` is in simulated seconds."""
        deadline = math.inf if timeout is None else self._now + timeout
        while True:
            waiting = [one for one in self._flying if ticket in (None, one.ticket)]
            if not waiting:
                return
            first = min(waiting, key=lambda one: (one.done, one.ticket, one.site))
            if first.done > deadline:
                self._now = deadline
                return
            self._now = max(self._now, first.done)
            self._flying.remove(first)
            for reply in self._inner.replies(ticket=first.inner):
                yield replace(reply, ticket=first.ticket)
                del reply

    def cancel(self, ticket: int) -> None:
        """Let go of what is outstanding of a send; those sites are free."""
        for one in [one for one in self._flying if one.ticket == ticket]:
            self._flying.remove(one)
            self._inner.cancel(one.inner)
            self._free[one.site] = min(self._free.get(one.site, 0.0), self._now)

    def watch(self, listener: Callable[[TransferProgress], object]) -> None:
        """See ``Engine.watch``."""
        self._inner.watch(listener)

    def remembers(self) -> StateTree:
        """The time, and when those will be done who are at work."""
        busy = {one.site: one.done for one in self._flying if one.done > self._now}
        return {"now": self._now, "busy": busy}

    def recall(self, state: StateTree) -> None:
        """Go on at the time at which a run was left."""
        kept: Any = state
        if "now" not in kept:  # the run was begun in real time
            return
        self._now = float(kept["now"])
        self._promised = {str(site): float(done) for site, done in kept["busy"].items()}

    def simulated_seconds(self) -> float | None:
        """The time."""
        return self._now

    def describe(self) -> str:
        """Such as ``in-process on cpu, in simulated time``."""
        return f"{self._inner.describe()}, in simulated time"

    def close(self) -> None:
        """Close what does the work."""
        self._inner.close()


@dataclass(slots=True, eq=False)
class _Flying:
    done: float
    ticket: int
    site: str
    inner: int
