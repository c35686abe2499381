"""A training script inside its site's process: a thread that is used as a coroutine.

The script runs only while its site is being worked on: from the task that it is handed to its next call for one. One
lock for the whole process sees to it that no two scripts run at once, so each finds its own ``sys.argv``, ``__main__``,
working folder and random state, as if it were alone.
"""

from __future__ import annotations

import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

from sfl.client import session as sessions
from sfl.client.ambient import Ambient
from sfl.client.session import ScriptResult, ScriptSite, ScriptTask, Session, logger
from sfl.errors import ClientApiError, ScriptError

_one_at_a_time = threading.Lock()
_IDLE = "idle"
_ENDED = "ended"


class InProcessScript:
    """One life of a script, from its first line to its end.

    Args:
        path: The script.
        args: Its arguments.
        site: Whose it is.
    """

    def __init__(self, path: Path, args: tuple[str, ...], site: ScriptSite) -> None:
        self._path, self._site = path, site
        self._ambient = Ambient(path, args, site)
        self._session = Session(site, self)
        self._tasks: SimpleQueue[ScriptTask | None] = SimpleQueue()
        self._events: SimpleQueue[str] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._result: ScriptResult | None = None
        self._error: ScriptError | None = None
        self.has_ended = False

    # The site's side

    def run(self, task: ScriptTask) -> ScriptResult:
        """Hand the script a task; come back with what it sent once it waits for the next, or has ended.

        Raises:
            ScriptError: If it failed, or did not answer the task.
        """
        event = self._turn(task, None)
        result, error = self._result, self._error
        self._result = self._error = None
        if error is not None:
            raise error
        if result is None:
            raise unanswered(self._path.name, is_over=event == _ENDED, has_received=self._session.is_initialized)
        return result

    def close(self, timeout: float) -> None:
        """Let the script's loop end; leave it behind if it does not within ``timeout`` seconds."""
        if self._thread is None or self.has_ended:
            return
        if self._turn(None, timeout) is None:
            logger.warning("%s: %s is still running and is left", self._site.name, self._path.name)
        elif self._error is not None:
            logger.warning("%s: at its end, %s", self._site.name, self._error)

    def _turn(self, task: ScriptTask | None, timeout: float | None) -> str | None:
        """The script runs while this waits; ``None`` if it has not come back in time."""
        with _one_at_a_time, self._ambient.entered():
            before = set(threading.enumerate())
            sessions.enter(self._session)
            try:
                self._tasks.put(task)
                if self._thread is None:
                    name = f"script-{self._site.name}"
                    self._thread = threading.Thread(target=self._live, daemon=True, name=name)
                    self._thread.start()
                event = self._events.get(timeout=timeout)
            except Empty:
                return None
            finally:
                sessions.leave(self._session, before)
            self.has_ended = event == _ENDED
            return event

    # The script's side, on its own thread

    def next_task(self) -> ScriptTask | None:
        """Give the turn back, unless a task is there already, and wait for one."""
        if self._tasks.empty():
            self._events.put(_IDLE)
        return self._tasks.get()

    def send(self, result: ScriptResult) -> None:
        """Keep what the site collects when the turn is its own again."""
        self._result = result

    def _live(self) -> None:
        sessions.own(self._session)
        try:
            source = self._path.read_bytes()
            exec(compile(source, str(self._path), "exec", dont_inherit=True), vars(self._ambient.main))
        except SystemExit as leave:
            if leave.code not in (None, 0):
                self._error = self._failure(leave)
        except BaseException as error:  # noqa: BLE001 - whatever ends the script is its site's to say
            self._error = self._failure(error)
        finally:
            self._events.put(_ENDED)

    def _failure(self, error: BaseException) -> ScriptError:
        _trim(error, str(self._path))
        said = f"exit code {error.code}" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        failure = ScriptError(f"{self._path.name} must run without an error, got {said}{_where(error, self._path)}.")
        failure.__cause__ = error
        return failure


def unanswered(name: str, *, is_over: bool, has_received: bool) -> ScriptError:
    """The error of a script that ended, or asked for the next task, without an answer to the one it had."""
    what = "ended" if is_over else "asked for the next task"
    if is_over and not has_received:
        return ScriptError(f"{name} must use the Client API, and ended without a call of flare.init(). Add the calls.")
    return ScriptError(
        f"{name} must answer each task with flare.send(), and {what} without it. Send an FLModel, then loop while "
        "flare.is_running()."
    )


def _trim(error: BaseException, file: str) -> None:
    """Keep of the traceback what begins in the script and does not lie in the Client API."""
    frames: list[TracebackType] = []
    walk = error.__traceback__
    while walk is not None:
        if frames or walk.tb_frame.f_code.co_filename == file:
            frames.append(walk)
        walk = walk.tb_next
    while frames and isinstance(error, ClientApiError) and frames[-1].tb_frame.f_code.co_filename != file:
        frames.pop()
    for index, frame in enumerate(frames):
        frame.tb_next = frames[index + 1] if index + 1 < len(frames) else None
    error.__traceback__ = frames[0] if frames else None


def _where(error: BaseException, path: Path) -> str:
    """Such as `` (train.py, line 12)``: the deepest line of the script that led there."""
    walk, line = error.__traceback__, 0
    while walk is not None:
        line = walk.tb_lineno if walk.tb_frame.f_code.co_filename == str(path) else line
        walk = walk.tb_next
    return f" ({path.name}, line {line})" if line else ""
