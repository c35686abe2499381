"""Sites of a simulation spread over worker processes, with the same bits as one process.

Every site belongs to one worker for the whole run, so what its client remembers stays with it. Parameters are written
once into memory that all workers read; each worker writes its delta into a slot of its own, and the parent aggregates
straight from there, in site order.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing import connection, reduction
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

from sfl.client.site import SiteProgram
from sfl.core.task import Reply, Status, Task
from sfl.engine.base import Engine
from sfl.engine.shared import Layout, open_anonymous, write
from sfl.engine.worker import Answer, Assignment, Command, Memory, main
from sfl.errors import EngineError
from sfl.train.devices import thread_environment
from sfl.types import Array, Parameters


class PoolEngine(Engine):
    """Runs sites in worker processes.

    Args:
        program: What every site runs. It is handed to other processes, so the client must be importable there: a
            class or function of a module, or of a main script guarded by ``if __name__ == "__main__":``.
        names: Names of the sites, in the order of their ``client_id``.
        devices: One for each worker.
        threads: Threads that torch may use in each worker.
        folder: Where sites keep their state; ``None`` keeps it in memory.
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
        self._exchange = 0
        self._shared = _Shared()
        context = _context(program)
        self._workers: list[_WorkerProcess] = []
        for number, device in enumerate(devices):
            mine = tuple((name, index) for index, name in enumerate(names) if index % len(devices) == number)
            self._workers.append(_WorkerProcess(context, Assignment(program, mine, device, threads, folder)))
        self._owner = {name: worker for worker in self._workers for name, _ in worker.assignment.sites}
        self._order: deque[str] = deque()

    def clients(self) -> list[str]:
        """Names of the sites, sorted."""
        return sorted(self._names)

    def send(self, task: Task, clients: Sequence[str]) -> None:
        """Publish the parameters, then queue the task with each site's worker."""
        self._exchange += 1
        late = any(worker.is_busy for worker in self._workers)
        fresh = self._shared.publish(task.parameters, anew=late)
        bare = replace(task, parameters={})
        for worker in self._workers:
            worker.ensure_alive()
            if fresh or not worker.has_memory:
                worker.give_memory(self._shared)
        for name in clients:
            self._owner[name].submit(Command(self._exchange, bare, name))
        self._order = deque(clients)

    def replies(self, timeout: float | None = None) -> Iterator[Reply]:
        """Replies in the order in which the sites were given, as soon as each one's turn has come."""
        deadline = None if timeout is None else time.monotonic() + timeout
        ready: dict[str, tuple[Answer, _WorkerProcess]] = {}
        try:
            while self._order:
                name = self._order[0]
                if name not in ready and not self._collect(ready, deadline):
                    return
                if name in ready:
                    self._order.popleft()
                    answer, worker = ready.pop(name)
                    yield worker.open(answer)
                    worker.free(answer)
        finally:
            for answer, worker in ready.values():
                worker.free(answer)
            self._order.clear()

    def _collect(self, ready: dict[str, tuple[Answer, _WorkerProcess]], deadline: float | None) -> bool:
        """Wait for one event from any worker; false when the time is over."""
        waits: dict[Any, _WorkerProcess] = {}
        for worker in self._workers:
            waits.update(worker.waits())
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        events = connection.wait(list(waits), left)
        for worker in {id(waits[event]): waits[event] for event in events}.values():
            for answer in worker.collect():
                if answer.exchange == self._exchange:
                    ready[answer.reply.site] = (answer, worker)
                else:  # a late site of an earlier exchange
                    worker.free(answer)
        return bool(events)

    def describe(self) -> str:
        """Such as ``in-process, 2 workers on cpu``."""
        return f"in-process, {len(self._devices)} workers on {', '.join(sorted(set(self._devices)))}"

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            worker.stop()
        self._shared.close()


class _Shared:
    """The global parameters in shared memory."""

    def __init__(self) -> None:
        self.descriptor = -1
        self.layout: Layout | None = None
        self._views: Parameters = {}

    def publish(self, parameters: Mapping[str, Array], *, anew: bool) -> bool:
        """Write the parameters where all workers read them; true if that is new memory.

        Args:
            parameters: The global parameters.
            anew: Take new memory in any case, because someone may still be reading the old.
        """
        layout = Layout.of(parameters)
        fresh = anew or layout != self.layout
        if fresh:
            self.close()
            self.layout, self.descriptor = layout, open_anonymous(layout.nbytes)
            self._views = layout.views(mmap.mmap(self.descriptor, layout.nbytes), writeable=True)
        write(self._views, parameters)
        return fresh

    def close(self) -> None:
        """Let the memory go; it is freed once the workers have, too."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor, self.layout, self._views = -1, None, {}


class _WorkerProcess:
    """The parent's end of one worker."""

    def __init__(self, context: ForkServerContext | SpawnContext, assignment: Assignment) -> None:
        self._context = context
        self.assignment = assignment
        self._queue: deque[Command] = deque()
        self._lost: list[Answer] = []
        self._start()

    def _start(self) -> None:
        theirs, self._commands = self._context.Pipe(duplex=True)
        self._answers, answers = self._context.Pipe(duplex=False)
        frees, self._frees = self._context.Pipe(duplex=False)
        self.has_memory = False
        self._slot: mmap.mmap | None = None
        self._process = self._context.Process(
            target=main, args=(theirs, answers, frees, self.assignment), daemon=True, name="sfl-worker"
        )
        with thread_environment(self.assignment.threads):
            self._process.start()
        for end in (theirs, answers, frees):
            end.close()

    @property
    def is_busy(self) -> bool:
        """Whether it still works on a task of an earlier exchange."""
        return bool(self._queue)

    def ensure_alive(self) -> None:
        """Start the worker again if it has died."""
        if not self._process.is_alive():
            self._collect_dead()
            self._start()

    def give_memory(self, shared: _Shared) -> None:
        """Hand over the parameters and a slot for deltas."""
        layout = shared.layout
        if layout is None:
            raise EngineError("parameters must be published before a worker can read them.")
        slot = open_anonymous(layout.nbytes)
        try:
            self._slot = mmap.mmap(slot, layout.nbytes)
            self._commands.send(Memory(layout))
            for descriptor in (shared.descriptor, slot):
                reduction.send_handle(self._commands, descriptor, self._process.pid)
            self.has_memory = True
        except (BrokenPipeError, ConnectionError):
            self.has_memory = False  # it died just now; its sites' replies will say so
        finally:
            os.close(slot)

    def submit(self, command: Command) -> None:
        """Queue a task."""
        self._queue.append(command)
        try:
            self._commands.send(command)
        except (BrokenPipeError, ConnectionError):
            self._collect_dead()

    def waits(self) -> list[tuple[Any, _WorkerProcess]]:
        """What to wait on for an event of this worker."""
        return [(self._answers, self), (self._process.sentinel, self)] if self._queue or self._lost else []

    def collect(self) -> list[Answer]:
        """Whatever has arrived, without waiting. A dead worker's sites have failed."""
        arrived, self._lost = self._lost, []
        try:
            while self._answers.poll():
                answer: Answer = self._answers.recv()
                self._queue.popleft()
                arrived.append(answer)
        except (EOFError, ConnectionError):
            self._collect_dead()
        if not self._process.is_alive() and not self._answers.poll():
            self._collect_dead()
        arrived += self._lost
        self._lost = []
        return arrived

    def _collect_dead(self) -> None:
        self._process.join(1.0)
        code = self._process.exitcode
        for command in self._queue:
            reason = f"{command.site}: its worker process died (exit code {code}); it starts anew with the next task"
            self._lost.append(Answer(command.exchange, Reply(command.site, Status.FAILED, reason=reason), None))
        self._queue.clear()

    def open(self, answer: Answer) -> Reply:
        """The reply with its arrays: views into the slot, lent until ``free``."""
        update = answer.reply.update
        if update is None or answer.layout is None or self._slot is None:
            return answer.reply
        delta = answer.layout.views(self._slot, writeable=False)
        return replace(answer.reply, update=replace(update, delta=delta))

    def free(self, answer: Answer) -> None:
        """Let the worker write its next delta."""
        if answer.layout is not None:
            try:
                self._frees.send(None)
            except (BrokenPipeError, ConnectionError):
                return  # it died; nothing waits for the slot

    def stop(self) -> None:
        """End the process: kindly when it is idle, at once when it is not."""
        for end in (self._commands, self._answers, self._frees):
            end.close()
        if self._queue:
            self._process.terminate()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _context(program: SiteProgram) -> ForkServerContext | SpawnContext:
    """Workers fork from a server that has imported what they need once, and that has never run a thread of torch."""
    if sys.platform == "win32":
        raise EngineError("workers must be 1 on Windows, where descriptors cannot be passed. Use --workers 1.")
    context = multiprocessing.get_context("forkserver")
    module = getattr(program.client, "__module__", "__main__")
    context.set_forkserver_preload([name for name in ("sfl.engine.worker", module) if name != "__main__"])
    return context
