"""Who may tell a Flower deployment what to do: SuperLink and SuperNodes as processes, and a stranger beside them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest

import engine_clients
from sfl.core.events import Event, StageStarted
from sfl.engine.flower.app_folder import write_app
from sfl.engine.flower.keys import make_node_keys
from sfl.env import FlowerEnv
from test_engines import remembers, temporary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FLWR = str(Path(sys.executable).with_name("flwr"))
LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1"}


class SeenError(Exception):
    """The test has seen enough of the run."""


def mine(folder: str) -> dict[str, list[psutil.Process]]:
    """Processes of the runs below this folder, by the temporary folder of each run."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        if temporary(process).startswith(folder):
            found.setdefault(temporary(process), []).append(process)
    return found


def listens(process: psutil.Process) -> list[tuple[str, int]]:
    try:
        open_now = process.net_connections(kind="tcp")
    except psutil.Error:  # an app that has just ended
        return []
    return [(found.laddr.ip, found.laddr.port) for found in open_now if found.status == psutil.CONN_LISTEN]


def flwr(home: Path, *arguments: str) -> tuple[int, str]:
    environ = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run([FLWR, *arguments], env=environ, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_a_stranger_on_this_machine_can_neither_submit_nor_look_nor_take_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tempfile.mkdtemp(prefix="t-", dir="/tmp")
    monkeypatch.setattr("tempfile.tempdir", short)
    home = tmp_path / "home"
    home.mkdir()
    app = write_app(tmp_path / "app", tmp_path, "a stranger's")
    _, public = make_node_keys(tmp_path, "stranger")
    asked = {"submit": ("run", str(app)), "look": ("ls",), "register": ("supernode", "register", str(public))}
    waits = replace(remembers(rounds=1), client=engine_clients.Sleeps, client_kwargs={})
    answers: dict[str, tuple[int, str]] = {}
    codes: list[grpc.StatusCode] = []
    addresses: set[str] = set()

    def look(event: Event) -> None:
        if not isinstance(event, StageStarted):
            return
        ((run, processes),) = mine(f"{tempfile.gettempdir()}/sfl-run-").items()
        config = (Path(run).parent / "flower" / "home" / "config.toml").read_text()
        (home / "config.toml").write_text(config)  # all but the token, which only the user can read
        assert tomllib.loads(config)["superlink"]["sfl"]["address"].startswith("127.0.0.1:")
        for name, arguments in asked.items():
            answers[name] = flwr(home, *arguments, "sfl")
        for process in processes:
            for ip, port in listens(process):
                addresses.add(ip)
                if process.name() in ("flower-superlin", "flower-supernod"):
                    codes.append(pull_tasks(port))
        raise SeenError

    with pytest.raises(SeenError):
        waits.execute(FlowerEnv(), observers=[look])
    assert sorted(answers) == sorted(asked)
    for code, said in answers.values():
        assert code != 0 or '"success": false' in said
        assert "authenticat" in said.lower() or "access denied" in said.lower() or "permission" in said.lower(), said
    assert codes
    assert grpc.StatusCode.OK not in codes
    assert addresses <= LOOPBACK
    Path(short).rmdir()


def pull_tasks(port: int) -> grpc.StatusCode:
    """How a request for the tasks that wait for somebody to execute them ends, without the secret."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary("/flwr.proto.Runtime/PullPendingTasks")(b"", timeout=5)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


STARTER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-m", "sfl.engine.flower.commands", sys.argv[1], "0.2"], stdin=subprocess.DEVNULL)
sys.stdin.read()
"""


def test_what_is_asked_for_beside_flare_is_forked_until_who_started_the_forks_is_gone() -> None:
    """As it is beside FLARE, which starts SuperLink and SuperNodes itself."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        name = Path(folder, "bin", "flower-superexec")
        with subprocess.Popen([sys.executable, "-c", STARTER, folder], stdin=subprocess.PIPE) as starter:
            deadline = time.monotonic() + 60
            while not os.access(name, os.X_OK):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            (commands,) = psutil.Process(starter.pid).children()
            shown = subprocess.run([name, "--version"], capture_output=True, text=True, check=True)
            assert "Flower version" in shown.stdout
            words = ["--insecure", "--appio-api-address", "127.0.0.1:1", "--plugin-type", "clientapp"]
            with subprocess.Popen([name, *words], stderr=subprocess.PIPE, text=True) as asked:
                assert asked.stderr is not None
                assert "Starting Flower SuperExec" in asked.stderr.readline()
                forked = commands.children()
                assert {process.name() for process in forked} == {"flower-superexe"}
                starter.kill()
                asked.stderr.read()  # to its end: nobody holds it any more
        assert psutil.wait_procs([commands, *forked], timeout=20)[1] == []
