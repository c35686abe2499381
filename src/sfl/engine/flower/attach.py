"""A job on a SuperLink that runs already: ``python -m sfl.engine.flower.attach FOLDER ADDRESS [ROOTS]``.

The app carries the job. Flower's own command line submits it, streams its log, and stops it; see `home` for what comes
back.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType

from sfl.engine.flower.app_folder import SIGNED, carried_in, carry, write_app
from sfl.engine.flower.deploy import write_connection
from sfl.engine.flower.following import Following
from sfl.engine.launch import Launch
from sfl.engine.owner import KEY, sign
from sfl.errors import EngineError
from sfl.privacy.sealed import Reader

_LINK = "sfl"
_TRIES, _AGAIN = 5, 3.0  # times that a log which breaks off is asked for, and seconds between two
_PATIENCE = 3600  # seconds that Flower may take over a piece of the log; its own minute is short for a slow line
_LOG = """import sys
from flwr.cli.app import app
if log := sys.modules.get("flwr.cli.log"):
    log.CONN_REFRESH_PERIOD = {patience}
sys.exit(app(["log", {run!r}, {link!r}]))
"""
_FLWR = str(Path(sys.executable).with_name("flwr"))


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
        got = str(answer.get("error-message") or said)
        raise EngineError(
            f"the SuperLink must take the app, got: {got} Check its address, root_certificates, and `flwr login`."
        )
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
    code = {str(place): Path(path) for place, path in settings["code"].items()}
    launch.add_settings(code={}, logs="", reader=reader.public.hex())  # what is this machine's own stays here
    what = f"Flower, {settings['num_clients']} nodes of the SuperLink {address}"
    app = write_app(launch.folder / "flower-app", None, what)
    carry(app, launch, code)
    sign(carried_in(app / "sfl_job"), (launch.folder / KEY).read_bytes(), SIGNED)
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
        words = [sys.executable, "-c", _LOG.format(patience=_PATIENCE, run=number, link=_LINK)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environ) as log:
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
