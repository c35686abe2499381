"""The parent's end of a worker process."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import reduction
from multiprocessing.context import ForkServerContext, SpawnContext
from pickle import PicklingError
from typing import Any

from sfl.core.task import Reply, Status
from sfl.engine import fork_server
from sfl.engine.shared import Published, leave, open_anonymous
from sfl.engine.worker import Answer, Assignment, Command, Memory, main
from sfl.errors import ConfigError, EngineError
from sfl.train.devices import thread_environment

_AHEAD = 2  # tasks a worker is handed at a time: the next is there when one is done


@dataclass(frozen=True, slots=True)
class Arrival:
    """An answer, with the memory in which its arrays lie until the worker may write there again."""

    answer: Answer
    slot: mmap.mmap | None
    free: Callable[[], None]

    @property
    def key(self) -> tuple[int, str]:
        """The ticket and the site that it answers for."""
        return self.answer.exchange, self.answer.reply.site

    def open(self) -> Reply:
        """The reply with its arrays: views into the slot, lent until ``free``."""
        reply = replace(self.answer.reply, ticket=self.answer.exchange)
        if reply.update is None or self.answer.layout is None or self.slot is None:
            return reply
        delta = self.answer.layout.views(self.slot, writeable=False)
        return replace(reply, update=replace(reply.update, delta=delta))


class WorkerProcess:
    """One life of a worker's process.

    Args:
        context: What starts it.
        assignment: Its sites.

    Raises:
        ConfigError: If the client or its arguments cannot be handed to another process.
    """

    def __init__(self, context: ForkServerContext | SpawnContext, assignment: Assignment) -> None:
        self._context, self._assignment = context, assignment
        self._queue: deque[tuple[Command, Published]] = deque()
        self._sent = 0  # how many of the queue, from its head, the process has
        self._memory: Published | None = None  # what it reads
        self._slot: mmap.mmap | None = None  # where it writes
        theirs, self._commands = context.Pipe(duplex=True)
        self._answers, answers = context.Pipe(duplex=False)
        frees, self._frees = context.Pipe(duplex=False)
        self._process = context.Process(
            target=main, args=(theirs, answers, frees, assignment), daemon=True, name="sfl-worker"
        )
        try:
            with thread_environment(assignment.threads), fork_server.told():
                self._process.start()
        except (PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"client and client_kwargs must be fit to hand to a worker process, got: {error}. "
                "Use a class or function of an importable module and plain arguments, or workers=1."
            ) from error
        except (EOFError, ConnectionError) as error:
            raise EngineError(
                "the process from which workers fork must live, and it has ended. If it said something, that stands "
                "before this: a module that it imports ahead, the client's own or one of its worker_imports, may fail. "
                "Else the machine may have no memory left for it."
            ) from error
        finally:
            for end in (theirs, answers, frees):
                end.close()

    def successor(self) -> WorkerProcess:
        """A new process in place of this one."""
        self.stop()
        return WorkerProcess(self._context, self._assignment)

    @property
    def is_busy(self) -> bool:
        """Whether there are tasks that it has not answered."""
        return bool(self._queue)

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def submit(self, command: Command, memory: Published) -> None:
        """Queue a task, whose parameters are in ``memory``."""
        self._queue.append((command, memory))
        self._push()

    def drop_unsent(self, exchange: int) -> None:
        """Forget the tasks of an exchange that the process has not been handed yet."""
        queue = list(self._queue)
        kept = [entry for entry in queue[self._sent :] if entry[0].exchange != exchange]
        self._queue = deque(queue[: self._sent] + kept)

    def _push(self) -> None:
        """Hand over tasks: few at a time, so that a pipe never fills, and new memory only once it is idle."""
        try:
            while self._sent < min(_AHEAD, len(self._queue)):
                command, memory = self._queue[self._sent]
                if memory is not self._memory:
                    if self._sent:
                        return  # it still reads, and writes into, what it has
                    self._give(memory)
                self._commands.send(command)
                self._sent += 1
        except ConnectionError:
            return  # it has just died: its sentinel says so to ``collect``

    def _give(self, memory: Published) -> None:
        """Hand over parameters and a slot for deltas."""
        slot = open_anonymous(memory.layout.slot_nbytes)
        try:
            self._slot = mmap.mmap(slot, memory.layout.slot_nbytes)
            self._commands.send(Memory(memory.layout))
            for descriptor in (memory.descriptor, slot):
                reduction.send_handle(self._commands, descriptor, self._process.pid)
            self._memory = memory
        finally:
            os.close(slot)

    def waits(self) -> list[Any]:
        """What to wait on for an event of this worker."""
        return [self._answers, self._process.sentinel] if self._queue else []

    def collect(self) -> tuple[list[Arrival], bool]:
        """Whatever has arrived, without waiting, and whether the process is dead."""
        arrived: list[Arrival] = []
        try:
            while self._answers.poll():
                arrived.append(self._arrival(self._answers.recv()))
                self._queue.popleft()
                self._sent -= 1
        except (EOFError, OSError):
            return arrived, True
        is_dead = not self.is_alive() and not self._answers.poll()
        self._push()
        return arrived, is_dead

    def bury(self) -> tuple[list[Arrival], list[tuple[Command, Published]]]:
        """Of a dead process: the reply of the site it worked on, and the tasks behind it."""
        self._process.join(1.0)  # its own exit code, not that of ``stop``
        self.stop()
        if not self._queue:
            return [], []
        command, _ = self._queue.popleft()
        code = self._process.exitcode
        reason = f"{command.site}: its worker process died (exit code {code}); it starts anew with the next task"
        reply = Reply(command.site, Status.FAILED, reason=reason)
        return [self._arrival(Answer(command.exchange, reply, None))], list(self._queue)

    def _arrival(self, answer: Answer) -> Arrival:
        return Arrival(answer, self._slot, self._free if answer.layout is not None else _nothing)

    def _free(self) -> None:
        """Let the worker write its next delta."""
        if self._slot is not None:
            leave(self._slot)
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


def _nothing() -> None:
    """There is no slot to free."""
