"""The process that owns an engine's processes: ``sfl.engine.guard MARK FOLDER COMMAND…``. None outlives the run.

Engines start processes that start others, some of them detached. All inherit one environment variable, the mark. The
guard ends every process that carries it when its command ends, when it is told to, or when whoever started it is gone:
then its standard input is at its end, also after ``kill -9``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import psutil

MARK = "_SFL_RUN"
_GRACE = 3.0  # seconds between asking and killing


class Guarded:
    """A command under a guard of its own, ended with everything that it started when the block is left.

    Args:
        command: What to run.
        log: File that its output is appended to.
        env: Its environment.
        folder: Removed if whoever started this is gone before the command has ended.
    """

    def __init__(self, command: Sequence[str], *, log: Path, env: Mapping[str, str], folder: Path) -> None:
        self.log, self.mark, self._folder = log, uuid.uuid4().hex, folder
        self._command, self._env = list(command), dict(env)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sfl.engine.guard", self.mark, str(self._folder), *self._command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,  # Ctrl-C is for the driver, which ends the run in order
            )
        return self

    def code(self) -> int | None:
        """The command's exit code, once it has ended."""
        return None if self._process is None else self._process.poll()

    def wait(self, seconds: float) -> bool:
        """Give the command time to end by itself; whether it did."""
        if self._process is None:
            return True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def tail(self, lines: int = 12) -> str:
        """The last lines of its output."""
        if not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            process.wait(4 * _GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            end_marked(self.mark)


def end_marked(mark: str, variable: str = MARK) -> None:
    """Ask every process that carries the mark to end; kill those that do not.

    Args:
        mark: The mark.
        variable: The environment variable that holds it.
    """
    for ask in (signal.SIGTERM, signal.SIGKILL):
        left = marked(mark, variable)
        for process in left:
            try:
                process.send_signal(ask)
            except psutil.NoSuchProcess:
                continue  # it has just ended by itself
        psutil.wait_procs(left, timeout=_GRACE)


def marked(mark: str, variable: str = MARK) -> list[psutil.Process]:
    """The processes, other than this one, that carry the mark."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(variable) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # another user's, or gone
    return found


def main(mark: str, folder: str, command: Sequence[str]) -> int:
    """Run the command under the mark until it ends or nobody is left to see it."""
    driver = os.getppid()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, MARK: mark})
    over = threading.Event()

    def orphaned() -> None:
        sys.stdin.buffer.read()
        over.set()

    def asked(_number: int, _frame: FrameType | None) -> None:
        over.set()

    signal.signal(signal.SIGTERM, asked)
    threading.Thread(target=orphaned, daemon=True).start()
    while not over.is_set() and child.poll() is None:
        over.wait(0.05)
    code = child.poll()
    if code is None:
        code = -signal.SIGTERM
    end_marked(mark)
    child.wait()
    if os.getppid() != driver:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(code if 0 <= code < 256 else 1)  # the thread that reads standard input would keep a normal exit waiting


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
