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
from pickle import PicklingError
from typing import Any

from sfl.client.site import SiteProgram
from sfl.core.task import Reply, Status, Task
from sfl.engine.base import Engine
from sfl.engine.shared import Layout, open_anonymous, write
from sfl.engine.worker import Answer, Assignment, Command, Memory, main
from sfl.errors import ConfigError, EngineError
from sfl.train.devices import thread_environment
from sfl.types import Array, Parameters

_AHEAD = 2  # tasks a worker is handed at a time: the next is there when one is done


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
        self._exchange = 0
        self._order: deque[str] = deque()
        self._shared = _Shared()
        self._owner = {name: index % len(devices) for index, name in enumerate(names)}
        self._workers: list[_WorkerProcess] = []
        context = _context(program)
        try:
            for number, device in enumerate(devices):
                mine = tuple((name, index) for index, name in enumerate(names) if self._owner[name] == number)
                assignment = Assignment(program, mine, device, threads, folder)
                self._workers.append(_WorkerProcess(context, assignment, self._shared))
        except BaseException:
            self.close()
            raise

    def clients(self) -> list[str]:
        """Names of the sites, sorted."""
        return sorted(self._names)

    def send(self, task: Task, clients: Sequence[str]) -> None:
        """Publish the parameters, then queue the task with each site's worker."""
        self._exchange += 1
        for number, worker in enumerate(self._workers):
            worker.drop_unsent()
            if not worker.is_alive():
                self._workers[number] = worker.successor()
        fresh = self._shared.publish(task.parameters, anew=any(worker.is_busy for worker in self._workers))
        for worker in self._workers:
            worker.has_memory = worker.has_memory and not fresh
        bare = replace(task, parameters={})
        for name in clients:
            self._workers[self._owner[name]].submit(Command(self._exchange, bare, name))
        self._order = deque(clients)

    def replies(self, timeout: float | None = None) -> Iterator[Reply]:
        """Replies in the order in which the sites were given; under a timeout as they arrive, so that nobody waits
        for a site that may be late, and another's turn is not lost with it.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        ready: dict[str, tuple[Answer, _WorkerProcess]] = {}
        try:
            while self._order:
                first = self._order[0]
                name = next(iter(ready), first) if deadline is not None and first not in ready else first
                if name in ready:
                    self._order.remove(name)
                    answer, worker = ready.pop(name)
                    try:
                        yield worker.open(answer)
                    finally:
                        worker.free(answer)
                elif not self._collect(ready, deadline):
                    return
        finally:
            for answer, worker in ready.values():
                worker.free(answer)
            self._order.clear()

    def _collect(self, ready: dict[str, tuple[Answer, _WorkerProcess]], deadline: float | None) -> bool:
        """Wait for one event from any worker; false when the time is over."""
        waits: dict[Any, int] = {}
        for number, worker in enumerate(self._workers):
            waits.update(dict.fromkeys(worker.waits(), number))
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        events = connection.wait(list(waits), left)
        for number in sorted({waits[event] for event in events}):
            worker = self._workers[number]
            answers, is_dead = worker.collect()
            if is_dead:
                answers += self._replace(number)
            for answer in answers:
                if answer.exchange == self._exchange:
                    ready[answer.reply.site] = (answer, worker)
                else:  # a late site of an earlier exchange
                    worker.free(answer)
        return bool(events)

    def _replace(self, number: int) -> list[Answer]:
        """Start a dead worker again: the site it worked on has failed, those behind it get their turn."""
        dead = self._workers[number]
        failed, waiting = dead.bury()
        self._workers[number] = dead.successor()
        for command in waiting:
            if command.exchange == self._exchange:
                self._workers[number].submit(command)
        return failed

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
    """The parent's end of one worker, for one life of its process."""

    def __init__(self, context: ForkServerContext | SpawnContext, assignment: Assignment, shared: _Shared) -> None:
        self.has_memory = False
        self._context, self._assignment, self._shared = context, assignment, shared
        self._queue: deque[Command] = deque()
        self._sent = 0  # how many of the queue, from its head, the process has
        self._slot: mmap.mmap | None = None
        theirs, self._commands = context.Pipe(duplex=True)
        self._answers, answers = context.Pipe(duplex=False)
        frees, self._frees = context.Pipe(duplex=False)
        self._process = context.Process(
            target=main, args=(theirs, answers, frees, assignment), daemon=True, name="sfl-worker"
        )
        try:
            with thread_environment(assignment.threads):
                self._process.start()
        except (PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"client and client_kwargs must be fit to hand to a worker process, got: {error}. "
                "Use a class or function of an importable module and plain arguments, or workers=1."
            ) from error
        finally:
            for end in (theirs, answers, frees):
                end.close()

    def successor(self) -> _WorkerProcess:
        """A new process in place of this one."""
        self.stop()
        return _WorkerProcess(self._context, self._assignment, self._shared)

    @property
    def is_busy(self) -> bool:
        """Whether it still works on a task."""
        return self._sent > 0

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def submit(self, command: Command) -> None:
        """Queue a task."""
        self._queue.append(command)
        self._push()

    def drop_unsent(self) -> None:
        """Forget the tasks that the process has not been handed yet."""
        while len(self._queue) > self._sent:
            self._queue.pop()

    def _push(self) -> None:
        """Hand over tasks: few at a time, so that a pipe never fills, and memory only to a process that reads it."""
        try:
            if self._queue and not self.has_memory and not self._sent:
                self._give_memory()
            while self.has_memory and self._sent < min(_AHEAD, len(self._queue)):
                self._commands.send(self._queue[self._sent])
                self._sent += 1
        except ConnectionError:
            return  # it has just died: its sentinel says so to ``collect``

    def _give_memory(self) -> None:
        """Hand over the parameters and a slot for deltas."""
        layout = self._shared.layout
        if layout is None:
            raise EngineError("parameters must be published before a worker can read them.")
        slot = open_anonymous(layout.slot_nbytes)
        try:
            self._slot = mmap.mmap(slot, layout.slot_nbytes)
            self._commands.send(Memory(layout))
            for descriptor in (self._shared.descriptor, slot):
                reduction.send_handle(self._commands, descriptor, self._process.pid)
            self.has_memory = True
        finally:
            os.close(slot)

    def waits(self) -> list[Any]:
        """What to wait on for an event of this worker."""
        return [self._answers, self._process.sentinel] if self._queue else []

    def collect(self) -> tuple[list[Answer], bool]:
        """Whatever has arrived, without waiting, and whether the process is dead."""
        arrived: list[Answer] = []
        try:
            while self._answers.poll():
                arrived.append(self._answers.recv())
                self._queue.popleft()
                self._sent -= 1
        except (EOFError, OSError):
            return arrived, True
        is_dead = not self.is_alive() and not self._answers.poll()
        self._push()
        return arrived, is_dead

    def bury(self) -> tuple[list[Answer], list[Command]]:
        """Of a dead process: the reply of the site it worked on, and the tasks behind it."""
        self._process.join(1.0)  # its own exit code, not that of ``stop``
        self.stop()
        if not self._queue:
            return [], []
        command = self._queue.popleft()
        code = self._process.exitcode
        reason = f"{command.site}: its worker process died (exit code {code}); it starts anew with the next task"
        reply = Reply(command.site, Status.FAILED, reason=reason)
        return [Answer(command.exchange, reply, None)], list(self._queue)

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
            except OSError:
                return  # it died; nothing waits for the slot

    def stop(self) -> None:
        """End the process: kindly when it is idle, at once when it is not."""
        if self._sent:
            self._process.terminate()
        for end in (self._commands, self._answers, self._frees):
            end.close()
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
    if module == "__main__" and not _main_is_importable():
        raise ConfigError(
            "client must be importable by a worker process, got one that is defined in an interactive session. "
            "Put it into a module or a script file, or use one worker."
        )
    context.set_forkserver_preload([name for name in ("sfl.engine.worker", module) if name != "__main__"])
    return context


def _main_is_importable() -> bool:
    """Whether workers can run the main module anew: it is a script or a module, not a prompt, notebook or ``-c``."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name.rpartition(".")[2] != "__main__"  # multiprocessing leaves a package's __main__ alone
    return Path(getattr(main, "__file__", None) or "").is_file()
