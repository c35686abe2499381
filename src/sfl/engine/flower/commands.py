"""Flower's commands as forks of one process, which has imported Flower once.

A command of Flower's takes more than a second of a core to import itself, and a deployment starts one for every
message. So the process of a deployment imports what they need, and forks for each. SuperExec starts apps by name from
``PATH``: there it finds a few lines that knock here, and the app is a fork, too. Where others start SuperLink and
SuperNodes, as FLARE does, a process beside them forks what those look for: ``python -m sfl.engine.flower.commands
FOLDER PAUSE``, until whoever started it is gone.

Flower's SuperNode and SuperExec sleep for one to three seconds between two looks for work, and whoever misses a part of
a message waits for one; no switch of theirs changes that. In a fork they wait shorter; all else runs as it is.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import distribution
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType
from typing import IO, Any

from flwr.supercore.inflatable import inflatable_utils

from sfl.engine.flower.knock import door_in, names_in, write_names
from sfl.engine.flower.waits import shorten
from sfl.errors import EngineError

COMMANDS = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr", "flwr-serverapp", "flwr-clientapp")
_APPS = ("flwr-serverapp", "flwr-clientapp")
_FOUND = ("flower-superexec", *_APPS)  # by SuperLink and SuperNode on their PATH
_MOST = 1 << 16
_LOOK = 0.5  # seconds between two looks at whether whoever started this process is there


class Commands:
    """Forks of this process that run Flower's commands. This process itself never speaks gRPC, which no fork survives.

    Args:
        folder: For the door that is knocked at, and the names that are found on ``PATH``.
        pause: Longest sleep of SuperNode and SuperExec between two looks for work, in seconds.
        asked: The commands that others may ask for.
    """

    def __init__(self, folder: Path, pause: float, asked: Sequence[str] = _APPS) -> None:
        self._pause, self._asked = pause, asked
        self._entries = _entries()
        import_module("sfl.engine.flower.apps")
        self._fork = multiprocessing.get_context("fork")
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(door_in(folder)))
        self._door.listen(1024)
        write_names(folder, asked)
        os.environ["PATH"] = os.pathsep.join([str(names_in(folder)), os.environ.get("PATH", os.defpath)])

    def start(self, name: str, arguments: Sequence[str], log: Path, prepare: Callable[[], None] | None = None) -> Any:
        """Start a command.

        Args:
            name: Which.
            arguments: Its arguments.
            log: File that its output is appended to.
            prepare: Called in the new process first.
        """
        with log.open("ab") as output:
            return self._forked([name, *arguments], output.fileno(), output.fileno(), prepare)

    def call(self, name: str, arguments: Sequence[str]) -> str:
        """Run a command to its end; what it wrote to standard output.

        Raises:
            EngineError: If it fails.
        """
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = self._forked([name, *arguments], output.fileno(), errors.fileno(), None)
            process.join()
            said = _text(output)
            if process.exitcode:
                said = " ".join(f"{said} {_text(errors)}".split())
                what = " ".join([name, *arguments[:2]])
                raise EngineError(f"{what} must succeed, got exit code {process.exitcode}: {said}")
            return said

    def serve(self, seconds: float) -> None:
        """Start what others ask for, until none has asked for so long."""
        multiprocessing.active_children()  # waits for those that have ended
        self._door.settimeout(seconds)
        try:
            while True:
                guest, _ = self._door.accept()
                with guest:
                    self._answer(guest)
        except TimeoutError:
            return

    def end(self) -> None:
        """Kill what still runs. Its files are the run's own, and asked to end, a SuperLink takes ten seconds."""
        for process in multiprocessing.active_children():
            process.kill()

    def _answer(self, guest: socket.socket) -> None:
        text, files, _, _ = socket.recv_fds(guest, _MOST, 2)
        try:
            while part := guest.recv(_MOST):
                text += part
            command = [str(word) for word in json.loads(text)]
            if command[0] not in self._asked or len(files) != 2:
                raise EngineError(f"a command must be one of {', '.join(self._asked)}, got {command[0]!r}.")
            self._forked(command, files[0], files[1], None)
        finally:
            for file in files:
                os.close(file)

    def _forked(
        self, command: Sequence[str], output: int, errors: int, prepare: Callable[[], None] | None
    ) -> ForkProcess:
        sys.stdout.flush()
        sys.stderr.flush()
        process = self._fork.Process(target=self._run, args=(command, output, errors, prepare), daemon=True)
        process.start()
        return process

    def _run(self, command: Sequence[str], output: int, errors: int, prepare: Callable[[], None] | None) -> None:
        """In the fork: become the command."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        self._door.close()
        _name(command[0])
        _look_again_after(self._pause)
        if prepare is not None:
            prepare()
        sys.argv = list(command)
        self._entries[command[0]]()


def _entries() -> dict[str, Callable[[], object]]:
    """What each command calls, as the installed Flower declares it."""
    declared = {entry.name: entry for entry in distribution("flwr").entry_points if entry.group == "console_scripts"}
    missing = [name for name in COMMANDS if name not in declared]
    if missing:
        raise EngineError(f"Flower must have the commands {', '.join(COMMANDS)}, got none named {', '.join(missing)}.")
    return {name: declared[name].load() for name in COMMANDS}


def _name(name: str) -> None:
    """The name under which the kernel lists this process, where it can be set by writing a file."""
    comm = Path("/proc/self/comm")
    if comm.exists():
        comm.write_text(name[:15], encoding="ascii")


def _look_again_after(pause: float) -> None:
    """Shorten the waits of Flower's loops for work in this process, and no others."""
    shorten(pause)
    for pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        defaults = pull.__kwdefaults__
        if defaults is not None and "initial_backoff" in defaults:  # a part of a message that is not there yet
            defaults["initial_backoff"] = pause


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def serve(folder: Path, pause: float) -> None:
    """Fork commands for the processes of whoever started this one, until it is gone, or asks for the end."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, _end)
    commands = Commands(folder, pause, _FOUND)
    try:
        while os.getppid() == parent:
            commands.serve(_LOOK)
    finally:
        commands.end()


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit


if __name__ == "__main__":
    serve(Path(sys.argv[1]), float(sys.argv[2]))
