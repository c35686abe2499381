"""A worker process: some of a simulation's sites, over shared memory."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import threading
from dataclasses import dataclass, replace
from multiprocessing import connection, parent_process, reduction, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sfl.client.site import Site, SiteHome, SiteProgram
from sfl.core.task import Reply, Task
from sfl.engine.shared import Layout, write
from sfl.train.devices import limit_threads
from sfl.types import Parameters


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told once: its program, its sites, its device."""

    program: SiteProgram
    sites: tuple[tuple[str, int], ...]
    device: str
    threads: int
    folder: Path | None


@dataclass(frozen=True, slots=True)
class Command:
    """One task for one site. ``task.parameters`` is empty: they lie in shared memory."""

    exchange: int
    task: Task
    site: str


@dataclass(frozen=True, slots=True)
class Memory:
    """New global parameters and a new slot for deltas; their two descriptors follow on the same pipe."""

    layout: Layout


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply without its arrays: they lie in the worker's slot as ``layout`` says."""

    exchange: int
    reply: Reply
    layout: Layout | None


def main(commands: Connection, answers: Connection, frees: Connection, assignment: Assignment) -> None:
    """Serve until the parent closes the pipe, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _die_with_parent()
    _Worker(commands, answers, frees, assignment).serve()


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel
    folder = util.get_temp_dir()  # the parent's, where its fork server listens

    def watch() -> None:
        connection.wait([sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


class _Worker:
    def __init__(self, commands: Connection, answers: Connection, frees: Connection, assignment: Assignment) -> None:
        self.commands, self.answers, self.frees = commands, answers, frees
        self.threads = assignment.threads
        folder = assignment.folder
        self.sites = {
            name: Site(
                assignment.program,
                name,
                index,
                device=assignment.device,
                home=SiteHome(folder=folder / name if folder is not None else None),
            )
            for name, index in assignment.sites
        }
        self.parameters: Parameters = {}
        self.slot: mmap.mmap | None = None
        self.slot_is_free = True

    def serve(self) -> None:
        while True:
            try:
                message: Any = self.commands.recv()
            except EOFError:
                for site in self.sites.values():
                    site.close()
                return
            if isinstance(message, Memory):
                self._map(message.layout)
            elif isinstance(message, Command):
                self._work(message)

    def _map(self, layout: Layout) -> None:
        self.parameters = layout.views(self._buffer(layout.nbytes, mmap.PROT_READ), writeable=False)
        self.slot = self._buffer(layout.slot_nbytes, mmap.PROT_READ | mmap.PROT_WRITE)

    def _buffer(self, nbytes: int, protection: int) -> mmap.mmap:
        descriptor = reduction.recv_handle(self.commands)
        try:
            return mmap.mmap(descriptor, nbytes, mmap.MAP_SHARED, protection)
        finally:
            os.close(descriptor)

    def _work(self, command: Command) -> None:
        limit_threads(self.threads)
        reply = self.sites[command.site].run(replace(command.task, parameters=self.parameters))
        layout: Layout | None = None
        update = reply.update
        if update is not None and update.delta:
            fitting = Layout.of(update.delta)
            if self.slot is not None and fitting.nbytes <= len(self.slot):
                layout = fitting
                self._wait_until_free()
                write(layout.views(self.slot, writeable=True), update.delta)
                self.slot_is_free = False
                reply = replace(reply, update=replace(update, delta={}))
        self.answers.send(Answer(command.exchange, reply, layout))

    def _wait_until_free(self) -> None:
        """The parent frees the slot when it has drawn the next reply."""
        if not self.slot_is_free:
            self.frees.recv()
            self.slot_is_free = True
