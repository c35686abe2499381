"""A job on a SuperLink that runs already: ``python -m sfl.engine.flower.attach FOLDER ADDRESS [ROOTS]``.

The app carries the job. Flower's own command line submits it, streams its log, and stops it; see `home` for what comes
back.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import IO

from sfl.core.events import Notice
from sfl.engine.flower.app_folder import carry, write_app
from sfl.engine.flower.deploy import write_connection
from sfl.engine.flower.home import EVENT, PART
from sfl.engine.flower.sealed import Reader
from sfl.engine.launch import Launch
from sfl.errors import EngineError
from sfl.io.tree import write_text
from sfl.utils.plain import describe

_LINK = "sfl"
_NUMBER = re.compile(r"\d+/[1-9]\d*")
_TRIES, _AGAIN = 5, 3.0  # times that a log which breaks off is asked for, and seconds between two
_FLWR = str(Path(sys.executable).with_name("flwr"))


class Following:
    """What has come home of a run.

    Args:
        launch: Where events are written to.
        reader: Opens the result.
    """

    def __init__(self, launch: Launch, reader: Reader) -> None:
        self._launch, self._reader = launch, reader
        self._events = 0
        self._has_gap = False
        self._parts: dict[int, bytes] = {}
        self._wanted = -1

    def read(self, log: IO[str]) -> None:
        """Take in a log; the lines that are not ours go to this process's output."""
        with self._launch.events.open("a", encoding="utf-8") as events:
            for line in log:
                kind, _, rest = line.rstrip("\n").partition(" ")
                number, _, text = rest.partition(" ")
                if kind == EVENT and number.isdecimal():
                    if line.endswith("\n") and _is_json(text):  # else it is cut, and the log is asked for again
                        self._tell(int(number), text, events)
                elif kind == PART and _NUMBER.fullmatch(number):
                    if line.endswith("\n"):
                        self._keep(*map(int, number.split("/")), text)
                elif line.strip():
                    sys.stdout.write(line)
                    sys.stdout.flush()

    def _keep(self, place: int, count: int, text: str) -> None:
        """Keep a part of the result."""
        self._wanted = count
        self._parts[place] = base64.b64decode(text)

    def _tell(self, number: int, text: str, events: IO[str]) -> None:
        """Pass an event on, unless it is known: a log that is asked for again begins anew."""
        if number < self._events:
            return
        if number > self._events and not self._has_gap:
            self._has_gap = True
            lost = Notice(
                text=f"events were lost on the way from the SuperLink, the first is number {self._events}: the run "
                "goes on, and what follows is shown. Its folder has all figures when it comes home.",
                level="warning",
            )
            events.write(json.dumps(describe(lost, "event")) + "\n")
        self._events = number + 1
        events.write(text + "\n")
        events.flush()

    def is_whole(self) -> bool:
        """Whether the result is all there."""
        return len(self._parts) == self._wanted

    def has_begun(self) -> bool:
        """Whether a part of the result is there."""
        return self._wanted > 0

    def missing(self) -> str:
        """What is not there of a result that has begun, in words."""
        if not self.has_begun():
            return ""
        there = f"{len(self._parts)} of {self._wanted} parts"
        return f" that came home whole, got {there} of it: resume the run, and it comes again"

    def unpack(self) -> bool:
        """Write what came home into the launch, the outcome last; whether there was one."""
        if not self.is_whole():
            return False
        data = self._reader.open(b"".join(self._parts[place] for place in range(self._wanted)))
        made = Launch(self._launch.folder / "home")
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(made.folder, filter="data")
        text = made.outcome.read_text(encoding="utf-8")
        if made.final.exists():
            shutil.move(made.final, self._launch.final)
        elif json.loads(text)["error"] is None:
            raise EngineError(
                "parameters must fit into 64 MiB to come home through a SuperLink's log, got more. They are on its "
                f"machine, in sfl-runs/{self._launch.read_settings()['run']} of FLWR_HOME."
            )
        self._tell_the_last(made.events)
        write_text(self._launch.outcome, text)
        return True

    def _tell_the_last(self, home: Path) -> None:
        """Pass on the events whose lines were lost at the log's end, where no later one shows it."""
        if home.exists():
            with self._launch.events.open("a", encoding="utf-8") as events:
                for number, text in enumerate(home.read_text(encoding="utf-8").splitlines()):
                    self._tell(number, text, events)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def submit(app: Path) -> str:
    """Submit an app; the run's number.

    Raises:
        EngineError: If the SuperLink does not take it.
    """
    done = subprocess.run(
        [_FLWR, "run", str(app), _LINK, "--format", "json"], capture_output=True, text=True, check=False
    )
    said = " ".join(f"{done.stdout} {done.stderr}".split())
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if done.returncode or not answer.get("success"):
        raise EngineError(f"the SuperLink must take the app, got: {answer.get('error-message') or said}")
    return str(answer["run-id"])


def stopper(run: str) -> Callable[[], None]:
    """What stops a run. In this process, since a new one would take longer to begin than a guard waits."""
    app = import_module("flwr.cli.app").app
    return partial(app, ["stop", run, _LINK], standalone_mode=False)


def run(launch: Launch, address: str, roots: Path | None) -> int:
    """Submit a job, stay until it has ended; the exit code."""
    home = launch.folder / "flower"
    home.mkdir(mode=0o700)
    credentials = Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")) / "credentials.yaml"
    if credentials.is_file():  # of somebody who has logged in with `flwr login`
        shutil.copy(credentials, home)
    os.environ["FLWR_HOME"] = str(home)
    write_connection(home, _LINK, address, roots)
    reader = Reader()
    settings = launch.read_settings()
    modules = {str(name): Path(path) for name, path in settings["modules"].items()}
    launch.add_settings(modules={}, logs="", reader=reader.public.hex())  # what is this machine's own stays here
    what = f"Flower, {settings['num_clients']} nodes of the SuperLink {address}"
    app = write_app(launch.folder / "flower-app", None, what)
    carry(app, launch, modules)
    number = submit(app)
    sys.stdout.write(f"run {number} on {address}\n")

    stop = stopper(number)

    def asked(_number: int, _frame: FrameType | None) -> None:
        try:
            stop()
        finally:
            os._exit(1)

    signal.signal(signal.SIGTERM, asked)
    following = Following(launch, reader)
    for _ in range(_TRIES):
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}  # else it keeps lines back until there are many
        with subprocess.Popen([_FLWR, "log", number, _LINK], stdout=subprocess.PIPE, text=True, env=environ) as log:
            if log.stdout is not None:
                following.read(log.stdout)
        if following.is_whole() or (log.returncode == 0 and not following.has_begun()):
            break
        time.sleep(_AGAIN)
    if following.unpack():
        return 0
    sys.stdout.write(f"the run {number} ended on {address} without an outcome{following.missing()}; above is its log\n")
    return 1


if __name__ == "__main__":
    sys.exit(run(Launch(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3]) if sys.argv[3:] else None))
