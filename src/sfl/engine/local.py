"""The in-process engine: sites of a simulation, one after the other, in this process. Nothing is serialised."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sfl.client.site import Site, SiteProgram
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
            name: Site(program, name, index, device=device, folder=folder / name if folder is not None else None)
            for index, name in enumerate(names)
        }
        self._device, self._threads = device, threads
        self._pending: list[tuple[Task, str]] = []

    def clients(self) -> list[str]:
        """Names of the sites, sorted."""
        return sorted(self._sites)

    def send(self, task: Task, clients: Sequence[str]) -> None:
        """Remember the task; each site does it when its reply is drawn."""
        self._pending = [(task, name) for name in clients]  # what is left of an abandoned exchange is dropped

    def replies(self, timeout: float | None = None) -> Iterator[Reply]:
        """Run the sites in turn. A site still working when the time is over is late; those after it do not start."""
        started = time.perf_counter()
        while self._pending:
            if timeout is not None and time.perf_counter() - started >= timeout:
                self._pending.clear()
                return
            task, name = self._pending.pop(0)
            limit_threads(self._threads)
            reply = self._sites[name].run(task)
            del task
            if timeout is not None and time.perf_counter() - started > timeout:
                reply = Reply(name, Status.LATE, reason=f"{name}: later than {timeout:g} s", seconds=reply.seconds)
            yield reply
            del reply

    def describe(self) -> str:
        """Such as ``in-process on cpu``."""
        return f"in-process on {self._device}"
