"""One standing federation on this machine, as a user meets it: commands that start, submit, look and bring home."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from scripts import EXAMPLES, recipe, write
from sfl.cli import main
from sfl.engine.guard import end_marked, marked
from sfl.engine.nvflare.standing import MARK, Standing
from sfl.errors import ConfigError, EngineError
from sfl.io.checkpoint import Checkpoints
from sfl.io.metrics import read_metrics
from sfl.server.app import sum_recipe
from sfl.types import Parameters

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:ssl_context is deprecated"),  # by what FLARE connects with, in its own thread
]
START = {"w": np.zeros(3)}
FAILS = """
import sfl.client as flare
flare.init()
while flare.is_running():
    flare.receive()
    raise ValueError("no data today")
"""


ENDLESS = """
import os, sys, time
import sfl.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    with open(os.path.join(PLACE, sys.argv[1] + "-" + flare.get_site_name()), "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)
    flare.send(model)
"""


@dataclass(frozen=True)
class Done:
    """How a command line ended."""

    returncode: int
    stdout: str
    stderr: str


def sfl(*argv: str, cwd: Path) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return Done(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Federation:
    """It runs; three jobs were submitted to it at once."""

    folder: Path
    jobs: dict[str, str]

    @property
    def kit(self) -> str:
        return "poc/kits/admin@sfl.poc"

    def sfl(self, *argv: str) -> Done:
        return sfl(*argv, cwd=self.folder)

    def home(self, job: str) -> Done:
        return self.sfl("download", self.jobs[job], "--wait", "--startup-kit", self.kit, "--out", f"runs/{job}")

    def final(self, job: str) -> Parameters:
        state = Checkpoints(self.folder / "runs" / job / "checkpoints").load_latest(print)
        assert state is not None
        return state.parameters


def script_export(folder: Path, name: str, script: str) -> None:
    argv = ["--output", name, "--num-clients", "2", "--num-rounds", "2", "--train-script", script]
    assert sfl("export", *argv, "--initial-ckpt", "start.safetensors", cwd=folder).returncode == 0


def nvflare(folder: Path, *argv: str) -> str:
    """Plain FLARE's own command."""
    command = [str(Path(sys.executable).parent / "nvflare"), *argv]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("poc")
    assert sfl("poc", "prepare", cwd=folder).returncode == 0
    command = [str(Path(sys.executable).parent / "sfl"), "poc", "start"]
    started = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    assert started.stdout.startswith("up: a server and site-1, site-2;")
    save_file(START, folder / "start.safetensors")
    script_export(folder, "numpy-job", str(EXAMPLES / "train_numpy.py"))
    script_export(folder, "failing", write(folder, FAILS))
    made = Federation(folder, {})
    try:
        submitted = made.sfl("poc", "submit", "sum", "--out", "runs/sum")
        assert submitted.returncode == 0, submitted.stderr
        made.jobs["sum"] = submitted.stdout.strip()
        for job in ("numpy-job", "failing"):
            said = nvflare(folder, "--format", "json", "job", "submit", "-j", job, "--startup-kit", made.kit)
            made.jobs[job] = json.loads(said)["data"]["job_id"]
        yield made
    finally:
        end_marked(Standing(folder / "poc").mark, MARK)


def test_a_submitted_job_is_seen_and_comes_home_with_the_bits_of_the_simulation(federation: Federation) -> None:
    early = federation.sfl("download", federation.jobs["sum"], "--startup-kit", federation.kit, "--out", "runs/early")
    if early.returncode:  # it was still running
        assert "a job must have ended before it comes home" in early.stderr
        assert not (federation.folder / "runs" / "early").exists()
    state = json.loads(federation.sfl("poc", "status", "--json").stdout)
    assert state["sites"] == ["site-1", "site-2"]
    assert {job["id"] for job in state["jobs"]} == set(federation.jobs.values())
    home = federation.home("sum")
    assert home.returncode == 0, home.stderr
    there = {path.name for path in (federation.folder / "runs" / "sum").iterdir()}
    assert {"metrics.csv", "report.html", "environment.json"} <= there
    assert federation.final("sum")["sum"].tobytes() == sum_recipe().execute().parameters["sum"].tobytes()


def test_a_run_is_submitted_again_and_goes_on_from_what_the_server_kept(federation: Federation) -> None:
    from sfl.env import ProdEnv

    env, out = ProdEnv(startup_kit=federation.folder / federation.kit), federation.folder / "runs" / "sum"
    with pytest.raises(ConfigError, match="out must be the folder of a run that nvflare-prod keeps"):
        env.submit(sum_recipe(), out=out.with_name("none"), resume=True)
    assert federation.home("sum").returncode == 0
    again = env.submit(sum_recipe(num_rounds=5), out=out, resume=True)
    home = federation.sfl("download", again, "--wait", "--startup-kit", federation.kit, "--out", "runs/sum")
    assert home.returncode == 0, home.stderr
    assert [entry["round"] for entry in read_metrics(out / "metrics.jsonl") if entry["round"]] == [1, 2, 3, 4, 5]
    assert federation.final("sum")["sum"].tobytes() == sum_recipe(num_rounds=5).execute().parameters["sum"].tobytes()


def test_an_exported_job_gives_the_same_bits_through_plain_flare(federation: Federation) -> None:
    here = recipe(str(EXAMPLES / "train_numpy.py"), model=START).execute().parameters["w"].tobytes()
    home = federation.home("numpy-job")
    assert home.returncode == 0, home.stderr
    assert federation.final("numpy-job")["w"].tobytes() == here
    nvflare(federation.folder, "simulator", "numpy-job", "-w", "simulated", "-n", "2", "-t", "2")
    (made,) = (federation.folder / "simulated" / "server" / "sfl-runs").glob("*/run/checkpoints")
    state = Checkpoints(made).load_latest(print)
    assert state is not None
    assert state.parameters["w"].tobytes() == here


def test_a_job_that_failed_is_called_so_and_says_why(federation: Federation) -> None:
    home = federation.home("failing")
    assert home.returncode == 1
    assert "ScriptError: train.py must run without an error, got ValueError: no data today" in home.stderr
    assert "Traceback" not in home.stderr
    assert (federation.folder / "runs" / "failing" / "environment.json").is_file()
    shown = federation.sfl("status", federation.jobs["failing"], "--startup-kit", federation.kit)
    assert "FINISHED:EXECUTION_EXCEPTION" in shown.stdout
    ended = federation.sfl("abort", federation.jobs["failing"], "--startup-kit", federation.kit)
    assert "has ended: FINISHED:EXECUTION_EXCEPTION" in ended.stdout


@pytest.mark.parametrize("command", ["status", "abort", "download"])
def test_a_job_that_is_not_there_is_one_line(federation: Federation, command: str) -> None:
    done = federation.sfl(command, "no-job", "--startup-kit", federation.kit)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a job must be one that the server knows, got 'no-job'")
    assert done.stderr.count("\n") == 1


def test_a_folder_of_another_run_is_not_written_into(federation: Federation) -> None:
    (federation.folder / "mine").mkdir()
    (federation.folder / "mine" / "precious").touch()
    done = federation.sfl(
        "download", federation.jobs["sum"], "--wait", "--startup-kit", federation.kit, "--out", "mine"
    )
    assert done.returncode == 2
    assert "out must be a new folder or that of job" in done.stderr
    refused = federation.sfl("poc", "clean")
    assert refused.returncode == 2
    assert "must be stopped first" in refused.stderr
    assert federation.sfl("poc", "start").returncode == 2


def test_what_is_aborted_ends_and_what_is_stopped_leaves_nothing(federation: Federation, tmp_path: Path) -> None:
    """Two jobs whose scripts are processes of their own; one is aborted, the other is running when all is stopped."""
    from sfl.env import ProdEnv

    env = ProdEnv(startup_kit=federation.folder / federation.kit)
    script = write(tmp_path, ENDLESS.replace("PLACE", repr(str(tmp_path))))
    jobs, pids = [], {}
    for name in ("one", "two"):
        endless = recipe(script, rounds=999, launch_external_process=True, train_args=name)
        jobs.append(env.submit(endless, out=tmp_path / name))
    with pytest.raises(EngineError, match=f"must have ended before the run goes on, got {jobs[1]}"):
        env.submit(endless, out=tmp_path / "two", resume=True)
    for name in ("one", "two"):
        pids[name] = [wait_for_pid(tmp_path / f"{name}-{site}") for site in ("site-1", "site-2")]
    aborted = federation.sfl("abort", jobs[0], "--startup-kit", federation.kit)
    assert "has ended: FINISHED:ABORTED" in aborted.stdout, aborted.stderr
    assert all(map(is_gone, pids["one"]))
    assert all(map(is_there, pids["two"]))
    assert federation.sfl("poc", "stop").stdout == "stopped in poc\n"
    standing = Standing(federation.folder / "poc")
    assert all(map(is_gone, pids["two"]))
    assert marked(standing.mark, MARK) == []
    assert federation.sfl("poc", "status").returncode == 1
    assert federation.sfl("poc", "clean").returncode == 0
    assert not standing.folder.exists()


def wait_for_pid(file: Path) -> int:
    deadline = time.monotonic() + 90
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"no {file.name}"
        time.sleep(0.1)
    return int(file.read_text())


def is_gone(pid: int, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while is_there(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not is_there(pid)


def is_there(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
