"""Sites of a simulation spread over worker processes, with the same bits as one process.

Every site belongs to one worker for the whole run, so what its client remembers stays with it. Parameters are written
once into memory that all workers read; each worker writes its delta into a slot of its own, and the parent aggregates
straight from there, in site order.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from multiprocessing import connection, util
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any, TypeAlias

from sfl.client.site import SiteProgram
from sfl.core.task import Reply, Task
from sfl.engine.base import Engine, owned
from sfl.engine.shared import Layout, Published
from sfl.engine.worker import Assignment, Command
from sfl.engine.worker_process import Arrival, WorkerProcess
from sfl.errors import ConfigError, EngineError
from sfl.types import Parameters
from sfl.utils.cache import keep_torch_in_cache

Key: TypeAlias = tuple[int, str]  # a ticket and a site


class PoolEngine(Engine):
    """Runs sites in worker processes.

    Args:
        program: What every site runs. It is handed to other processes, so the client must be importable there: a
            class or function of a module, or of a main script guarded by ``if __name__ == "__main__":``.
        names: Names of the sites, in the order of their ``client_id``.
        devices: One for each worker.
        threads: Threads that torch may use in each worker.
        folder: Where sites keep their state; ``None`` keeps it in memory.

    Raises:
        ConfigError: If the client or its arguments cannot be handed to another process.
    """

    def __init__(
        self,
        program: SiteProgram,
        names: Sequence[str],
        *,
        devices: Sequence[str],
        threads: int = 1,
        folder: Path | None = None,
    ) -> None:
        self._names = list(names)
        self._devices, self._threads = list(devices), threads
        self._last = 0
        self._open: dict[int, list[str]] = {}  # by ticket, the sites that have not been drawn, as they were given
        self._ready: dict[Key, Arrival] = {}
        self._aside: dict[Key, Reply] = {}  # arrived while another ticket was drawn, with arrays of their own
        self._published: Published | None = None
        self._owner = {name: index % len(devices) for index, name in enumerate(names)}
        self._workers: list[WorkerProcess] = []
        context = _context(program)
        try:
            for number, device in enumerate(devices):
                mine = tuple((name, index) for index, name in enumerate(names) if self._owner[name] == number)
                self._workers.append(WorkerProcess(context, Assignment(program, mine, device, threads, folder)))
        except BaseException:
            self.close()
            raise

    def clients(self) -> list[str]:
        """Names of the sites, sorted."""
        return sorted(self._names)

    def send(self, task: Task, clients: Sequence[str]) -> int:
        """Publish the parameters, then queue the task with each site's worker."""
        self._last += 1
        memory = self._publish(task.parameters)
        for number, worker in enumerate(self._workers):
            if not worker.is_alive() and not worker.is_busy:
                self._workers[number] = worker.successor()
        bare = replace(task, parameters={}, packed=None)
        self._open[self._last] = list(clients)
        for name in clients:
            self._workers[self._owner[name]].submit(Command(self._last, bare, name), memory)
        return self._last

    def _publish(self, parameters: Parameters) -> Published:
        """Put the parameters where all workers read them: in new memory if someone may still be reading the old."""
        layout = Layout.of(parameters)
        memory = self._published
        if memory is None or memory.layout != layout or any(worker.is_busy for worker in self._workers):
            self._published = memory = None  # the old goes before the new comes
            self._published = memory = Published(layout)
        memory.write(parameters)
        return memory

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        """Replies to one ticket in the order in which its sites were given; as they arrive to several, and under a
        timeout, so that nobody waits for a site that may be late, and another's turn is not lost with it.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        in_turn = ticket is not None and deadline is None
        while ticket in self._open or (ticket is None and self._open):
            waiting = self._waiting(ticket)
            turns = islice(waiting, 1) if in_turn else waiting
            key = next((key for key in turns if key in self._ready or key in self._aside), None)
            if key is None:
                if not self._collect(ticket, deadline):
                    return
                continue
            self._close_key(key)
            if key in self._aside:
                yield self._aside.pop(key)
                continue
            arrival = self._ready.pop(key)
            try:
                yield arrival.open()
            finally:
                arrival.free()

    def _waiting(self, ticket: int | None) -> Iterator[Key]:
        """What has not been drawn, in the order in which it was sent."""
        for number in self._open if ticket is None else (ticket,):
            for site in self._open[number]:
                yield number, site

    def _close_key(self, key: Key) -> None:
        ticket, site = key
        self._open[ticket].remove(site)
        if not self._open[ticket]:
            del self._open[ticket]

    def _collect(self, ticket: int | None, deadline: float | None) -> bool:
        """Wait for one event from any worker; false when the time is over."""
        if ticket is not None:  # what lies in a slot would keep its worker from going on to this ticket
            for key in [key for key in self._ready if key[0] != ticket]:
                self._set_aside(self._ready.pop(key))
        waits: dict[Any, int] = {}
        for number, worker in enumerate(self._workers):
            waits.update(dict.fromkeys(worker.waits(), number))
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        events = connection.wait(list(waits), left)
        for number in sorted({waits[event] for event in events}):
            arrivals, is_dead = self._workers[number].collect()
            if is_dead:
                arrivals += self._replace(number)
            for arrival in arrivals:
                number_of, site = arrival.key
                if site not in self._open.get(number_of, ()):
                    arrival.free()  # nobody waits for it any more
                elif ticket in (None, number_of):
                    self._ready[arrival.key] = arrival
                else:
                    self._set_aside(arrival)
        return bool(events)

    def _set_aside(self, arrival: Arrival) -> None:
        self._aside[arrival.key] = owned(arrival.open())
        arrival.free()

    def _replace(self, number: int) -> list[Arrival]:
        """Start a dead worker again: the site it worked on has failed, those behind it get their turn."""
        dead = self._workers[number]
        failed, waiting = dead.bury()
        self._workers[number] = dead.successor()
        for command, memory in waiting:
            if command.exchange in self._open:
                self._workers[number].submit(command, memory)
        return failed

    def cancel(self, ticket: int) -> None:
        """Forget what is outstanding of a ticket; a site at work finishes for nobody."""
        self._open.pop(ticket, None)
        for worker in self._workers:
            worker.drop_unsent(ticket)
        for key in [key for key in self._ready if key[0] == ticket]:
            self._ready.pop(key).free()
        for key in [key for key in self._aside if key[0] == ticket]:
            del self._aside[key]

    def describe(self) -> str:
        """Such as ``in-process, 2 workers on cpu``."""
        return f"in-process, {len(self._devices)} workers on {', '.join(sorted(set(self._devices)))}"

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            worker.stop()


def _context(program: SiteProgram) -> ForkServerContext | SpawnContext:
    """Workers fork from a server that has imported what they need once, and that has never run a thread of torch."""
    if sys.platform == "win32":
        raise EngineError("workers must be 1 on Windows, where descriptors cannot be passed. Use --workers 1.")
    context = multiprocessing.get_context("forkserver")
    module = getattr(program.client, "__module__", "__main__")
    if module == "__main__" and not _main_is_importable():
        raise ConfigError(
            "client must be importable by a worker process, got one that is defined in an interactive session. "
            "Put it into a module or a script file, or use one worker."
        )
    util.get_temp_dir()  # before any worker's Process is made, which copies its name: else each makes one of its own
    ahead = getattr(program.client, "worker_imports", ())
    if not isinstance(ahead, tuple) or not all(isinstance(name, str) for name in ahead):
        raise ConfigError(f"worker_imports must be a tuple of names of modules, got {ahead!r}.")
    if ahead:
        keep_torch_in_cache()  # the server is told of it by its environment
    modules = ("sfl.engine.worker", module, *ahead, "sfl.engine.fork_server")
    context.set_forkserver_preload([name for name in modules if name != "__main__"])
    return context


def _main_is_importable() -> bool:
    """Whether workers can run the main module anew: it is a script or a module, not a prompt, notebook or ``-c``."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name.rpartition(".")[2] != "__main__"  # multiprocessing leaves a package's __main__ alone
    return Path(getattr(main, "__file__", None) or "").is_file()
