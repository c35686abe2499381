"""A training script as a process of its own, in its own process group, that ends with its site."""

from __future__ import annotations

import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from sfl.client import wire
from sfl.client.inprocess import unanswered
from sfl.client.session import ScriptResult, ScriptSite, ScriptTask, logger
from sfl.errors import ConfigError, ScriptError

_KEPT, _TAIL = 300, 30  # lines of stderr that are kept, for several processes and torchrun, and that an error shows
_RANK = re.compile(r"\[rank\d+\]: ")  # what torch puts before each line of an error, in one of several processes
_HOOKS = Path(__file__).parent / "hooks"


class ExternalScript:
    """One life of a script's process.

    Args:
        path: The script.
        args: Its arguments.
        command: What runs it, such as ``python3 -u``.
        site: Whose it is.

    Raises:
        ConfigError: If the command is not there.
    """

    def __init__(self, path: Path, args: tuple[str, ...], command: str, site: ScriptSite) -> None:
        self._path, self._site = path, site
        self._talk: socket.socket | None = None
        self._watches: list[socket.socket] = []
        self._readers: list[threading.Thread] = []
        self._said: deque[str] = deque(maxlen=_KEPT)
        self.has_ended = self._is_idle = False
        self._listener, self._address = wire.listen(site)
        try:
            self._process = self._started([*shlex.split(command), str(path), *args])
        except BaseException:
            self._clean()
            raise
        self._readers = [
            threading.Thread(target=self._forward, args=(stream, tail), daemon=True, name="script-output")
            for stream, tail in ((self._process.stdout, None), (self._process.stderr, self._said))
        ]
        for reader in self._readers:
            reader.start()

    def run(self, task: ScriptTask) -> ScriptResult:
        """Hand the script a task; come back with what it sent once it waits for the next, or has ended.

        Raises:
            ScriptError: If its process failed, or did not answer the task.
        """
        result: ScriptResult | None = None
        while not self._is_idle and self._event() is not None:
            pass  # its first lines
        if self._talk is not None and self._is_idle:
            self._is_idle = False
            self._tell("task", wire.task_tree(task))
            while not self._is_idle and (event := self._event()) is not None:
                result = event if isinstance(event, ScriptResult) else result
        if not self._is_idle:
            self._end()
        if result is None:
            raise unanswered(self._path.name, is_over=self.has_ended, has_received=self._talk is not None)
        return result

    def close(self, timeout: float) -> None:
        """Let the script's loop end; end its process group if it does not within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        if self._is_idle:
            self._tell("stop")
            self._wait(deadline)
            if self._process.poll() not in (None, 0):
                logger.warning("%s: at its end, %s", self._site.name, self._failure())
            elif self._process.poll() is None:
                logger.warning("%s: %s is still running and is stopped", self._site.name, self._path.name)
        self._kill()

    def _started(self, words: list[str]) -> subprocess.Popen[str]:
        home = str(Path(__file__).parents[2])
        before = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        paths = [str(_HOOKS), *before, *([] if home in before else [home])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), wire.VARIABLE: self._address.to_text()}
        bin_folder = str(Path(sys.executable).parent)  # `python3` is this one, wherever it was started from
        environment["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)])
        program = shutil.which(words[0], path=environment["PATH"])
        if program is None:
            raise ConfigError(f"command must begin with a program that is there, got {words[0]!r}.")
        return subprocess.Popen(
            [program, *words[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def _forward(self, stream: IO[str], tail: deque[str] | None) -> None:
        with stream:
            for line in stream:
                text = line.rstrip("\n")
                if tail is not None:
                    tail.append(text)
                if text.strip():
                    logger.info("%s: %s", self._site.name, text)

    def _event(self) -> ScriptResult | str | None:
        """Wait for the next thing that the script's process does; ``None`` when it has ended."""
        while True:
            sources = [self._listener, *([self._talk] if self._talk is not None else [])]
            ready, _, _ = select.select(sources, [], [], 0.1)
            if self._listener in ready:  # first: who came before a message is let in, or sent away, before it is read
                self._accept()
            elif self._talk is not None and self._talk in ready:
                return self._message(self._talk)
            elif self._process.poll() is not None:
                return None

    def _message(self, talk: socket.socket) -> ScriptResult | str | None:
        try:
            kind, body = wire.receive(talk)
        except EOFError:
            self._process.wait()
            return None
        if kind == "result":
            return ScriptResult(
                parameters=body["parameters"], is_diff=body["is_diff"], metrics=body["metrics"], steps=body["steps"]
            )
        self._is_idle = kind == "idle"
        return kind

    def _accept(self) -> None:
        """Let a process of the script in, if it knows the token; one of them talks, all are let watch."""
        connection, kind = wire.accept(self._listener, self._address)
        if not kind:
            logger.warning("%s: a process without the token was turned away", self._site.name)
            connection.close()
            return
        if kind == "talk" and self._talk is None:
            self._talk = connection
        elif kind == "watch":
            self._watches.append(connection)
        else:
            logger.warning("%s: only one process may exchange models; pass its rank to init()", self._site.name)
            connection.close()

    def _tell(self, kind: str, tree: object = None) -> None:
        if self._talk is not None:
            try:
                wire.send(self._talk, kind, tree)
            except ConnectionError:
                return  # it has just died, which the next event says

    def _end(self) -> None:
        """The process is over: raise what it died of.

        Raises:
            ScriptError: Unless it ended by itself with exit code 0.
        """
        self.has_ended = True
        failed = self._process.wait() != 0
        for reader in self._readers:
            reader.join(2.0)
        self._kill()
        if failed:
            raise self._failure()

    def _failure(self) -> ScriptError:
        code = self._process.returncode
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        lines = last_words(self._said)
        last = next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
        error = ScriptError(f"{self._path.name} must run without an error, got {how}{last}.")
        error.add_note("Its last lines:\n" + "\n".join(lines))
        return error

    def _wait(self, deadline: float) -> None:
        """Until the process has ended, or ``deadline``."""
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def _kill(self) -> None:
        """End every process of the script: its group at once, others as they see the watch end."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            self._wait(time.monotonic() + 1.0)
        self._process.wait()
        self._clean()

    def _clean(self) -> None:
        for connection in [self._listener, *self._watches, *([self._talk] if self._talk is not None else [])]:
            connection.close()
        for reader in self._readers:
            reader.join(2.0)  # until the last process that holds the other end has seen the watch end


def last_words(said: Iterable[str]) -> list[str]:
    """What a script said last; of several processes, what the one said whose error came first."""
    lines = list(said)
    first = next((found[0] for line in lines if (found := _RANK.match(line))), "")
    return [line.removeprefix(first) for line in lines if line.startswith(first)][-_TAIL:]
