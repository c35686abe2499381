"""The in-process engine: sites of a simulation, one after the other, in this process. Nothing is serialised."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sfl.client.site import Site, SiteHome, SiteProgram
from sfl.core.task import Reply, Status, Task
from sfl.engine.base import Engine
from sfl.train.devices import limit_threads


class LocalEngine(Engine):
    """Runs each site in turn and streams its reply, so memory holds one site's work at a time.

    Args:
        program: What every site runs.
        names: Names of the sites, in the order of their ``client_id``.
        device: Where their clients compute.
        threads: Threads that torch may use.
        folder: Where sites keep their state; ``None`` keeps it in memory.
    """

    def __init__(
        self,
        program: SiteProgram,
        names: Sequence[str],
        *,
        device: str = "cpu",
        threads: int = 1,
        folder: Path | None = None,
    ) -> None:
        self._sites = {
            name: Site(
                program, name, index, device=device, home=SiteHome(folder=folder / name if folder is not None else None)
            )
            for index, name in enumerate(names)
        }
        self._device, self._threads = device, threads
        self._last = 0
        self._pending: list[tuple[int, Task, str]] = []

    def clients(self) -> list[str]:
        """Names of the sites, sorted."""
        return sorted(self._sites)

    def send(self, task: Task, clients: Sequence[str]) -> int:
        """Remember the task; each site does it when its reply is drawn."""
        self._last += 1
        self._pending += [(self._last, task, name) for name in clients]
        return self._last

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        """Run the sites in turn. A site still working when the time is over is late; those after it do not start."""
        started = time.perf_counter()
        while (turn := self._turn(ticket)) is not None:
            if timeout is not None and time.perf_counter() - started >= timeout:
                return
            number, task, name = self._pending.pop(turn)
            limit_threads(self._threads)
            reply = replace(self._sites[name].run(task), ticket=number)
            del task
            if timeout is not None and time.perf_counter() - started > timeout:
                reason = f"{name}: later than {timeout:g} s"
                reply = Reply(name, Status.LATE, reason=reason, seconds=reply.seconds, ticket=number)
            yield reply
            del reply

    def _turn(self, ticket: int | None) -> int | None:
        """Where the next task in turn stands: of this ticket, or of any."""
        return next((at for at, (number, *_) in enumerate(self._pending) if ticket in (None, number)), None)

    def cancel(self, ticket: int) -> None:
        """Forget the tasks that have not begun."""
        self._pending = [entry for entry in self._pending if entry[0] != ticket]

    def close(self) -> None:
        """Let every site's client go."""
        for site in self._sites.values():
            site.close()

    def describe(self) -> str:
        """Such as ``in-process on cpu``."""
        return f"in-process on {self._device}"
