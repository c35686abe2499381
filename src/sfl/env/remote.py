"""What environments have in common whose server runs in another process: launch, follow, end."""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sfl import errors
from sfl.core.events import Notice, Observer, RoundFinished
from sfl.engine.guard import Guarded
from sfl.engine.launch import Launch
from sfl.env.checks import check_counts, refuse_provisioned
from sfl.errors import ConfigError, EngineError, SflError
from sfl.io.checkpoint import load_state
from sfl.io.relay import EventReader
from sfl.io.site_store import SecretStore
from sfl.io.tree import save_tree, write_secret, write_text
from sfl.recipe import Recipe, RunResult
from sfl.server.job import Job
from sfl.train.devices import devices_of_workers
from sfl.types import site_names
from sfl.utils.plain import describe

_INSIDE = "_SFL_INSIDE"
_POLL = 0.05
_LONGEST = 24


@dataclass(frozen=True, slots=True)
class Plan:
    """One run of a recipe, as its environment sees it.

    Attributes:
        recipe: What to run.
        job: What it builds.
        launch: The folder in which this process and the engine's meet.
        out: The run's folder, if it has one.
        resume: Whether to go on.
    """

    recipe: Recipe
    job: Job
    launch: Launch
    out: Path | None
    resume: bool


@dataclass(frozen=True, kw_only=True)
class RemoteEnv(ABC):
    """An environment whose server is another process of this machine.

    Attributes:
        title: The engine in words, for the line that says it is starting.
        num_clients: Number of sites; by default the federation's.
        num_threads: Sites that work side by side; by default the federation's ``workers``, 0 means one per GPU or core.
        device: Where sites compute: auto, cpu, mps, cuda or cuda:N.
        shutdown: Seconds that the engine gets to end in order, after the job is done.
    """

    title: ClassVar[str]

    num_clients: int | None = None
    num_threads: int | None = None
    device: str = "auto"
    shutdown: float = 10.0

    @property
    def provisions(self) -> bool:
        """Whether its sites have kits, which are made for the run."""
        return False

    @abstractmethod
    def command(self, launch: Launch) -> list[str]:
        """The command that runs the engine to the end of the job."""

    def start(self, launch: Launch, log: Path) -> AbstractContextManager[Guarded]:
        """The engine's processes."""
        environ = child_environment(int(launch.read_settings()["threads"]), launch.folder / "tmp")
        return Guarded(self.command(launch), log=log, env=environ, folder=launch.folder)

    def __post_init__(self) -> None:
        check_counts(self.num_clients, self.num_threads)

    def run(self, recipe: Recipe, *, out: Path | None, resume: bool, observers: Sequence[Observer]) -> RunResult:
        """Run a recipe on the engine, and show it here.

        Raises:
            EngineError: If the engine ends without saying how the job ended.
            SflError: Whatever the job itself raises, as it would in-process.
        """
        if os.environ.get(_INSIDE):
            raise ConfigError(
                "a script that defines a client must be importable, got one that runs a recipe while it is imported. "
                'Put its own work under `if __name__ == "__main__":`.'
            )
        if resume:
            self.check_resumable(out)
        job = recipe.build()
        with tempfile.TemporaryDirectory(prefix="sfl-run-", dir=_short(), ignore_cleanup_errors=True) as temporary:
            launch = Launch(Path(temporary))
            (launch.folder / "tmp").mkdir()
            logs = out / "logs" if out is not None else launch.folder / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            self.write(Plan(recipe, job, launch, out, resume), logs.absolute())
            where = f"; its logs are in {logs}" if out is not None else ""
            for observer in observers:
                observer(Notice(text=f"starting {self.title}{where}"))
            rounds: list[RoundFinished] = []
            with self.start(launch, logs / "engine.log") as engine:
                try:
                    reason = _follow(launch, engine, [_keeper(rounds), *observers])
                finally:  # a job that failed has left checkpoints, figures and a ledger, too
                    if out is not None and launch.outcome.exists():
                        self.collect(launch, out)
                engine.wait(self.shutdown)
            secure = job.program.secure
            key = secure.key(_keeper_of(launch.read_settings())) if secure is not None else None
            return RunResult(load_state(launch.final), tuple(rounds), reason, out, key)

    def write(self, plan: Plan, logs: Path) -> None:
        """Write what the engine's processes read."""
        save_tree(plan.launch.recipe, describe(plan.recipe, "the recipe"))
        plan.launch.write_program(plan.job.program)
        settings = {**self.settings(plan), "logs": str(logs)}
        write_text(plan.launch.settings, json.dumps(settings, indent=1) + "\n")
        secure = plan.job.program.secure
        if secure is not None and self.provisions:
            for site, files in secure.kits(settings["names"], _keeper_of(settings)).items():
                for name, content in files.items():
                    write_secret(plan.launch.kits / site / name, content)

    def check_resumable(self, out: Path | None) -> None:
        """Whether what a run needs to go on lies here.

        Raises:
            ConfigError: If it lies on a provisioned federation.
        """
        refuse_provisioned(out)

    def collect(self, launch: Launch, out: Path) -> None:  # noqa: B027 - nothing to do where the server wrote there
        """Bring what the run left into ``out``."""

    def settings(self, plan: Plan) -> dict[str, Any]:
        """What the engine's processes are told."""
        job, out = plan.job, plan.out
        names = site_names(self.num_clients or job.federation.num_clients)
        wanted = job.federation.workers if self.num_threads is None else self.num_threads
        devices = devices_of_workers(wanted, len(names), self.device)
        return {
            "names": list(names),
            "out": str(out.absolute()) if out is not None else "",
            "resume": plan.resume,
            "sites": str((out or plan.launch.folder).absolute() / "sites"),
            "workers": len(devices),
            "gpus": sum(device.startswith("cuda") for device in devices),
            "devices": devices,
            "threads": job.federation.threads,
        }


def _keeper_of(settings: dict[str, Any]) -> SecretStore:
    """Where sites of this machine keep what they have in common."""
    return SecretStore(Path(settings["sites"]) / "any")


def _short() -> str:
    """A folder for temporary files whose name leaves room for sockets: a path of theirs has about 100 characters."""
    return tempfile.gettempdir() if len(tempfile.gettempdir()) <= _LONGEST else "/tmp"


def child_environment(threads: int, temporary: Path) -> dict[str, str]:
    """The environment of an engine's processes: our modules, no telemetry, as many threads as asked for.

    Args:
        threads: CPU threads for each of them.
        temporary: Where they put temporary files; some engines leave theirs behind.
    """
    path = os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in sys.path))  # noqa: PTH100
    return {
        **os.environ,
        "PYTHONPATH": path,
        "TMPDIR": str(temporary),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        _INSIDE: "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",  # Ray listens on every interface, and runs code for whoever it lets in
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _keeper(rounds: list[RoundFinished]) -> Observer:
    return lambda event: rounds.append(event) if isinstance(event, RoundFinished) else None


def _follow(launch: Launch, engine: Guarded, observers: Sequence[Observer]) -> str:
    """Tell observers what happens until the outcome is there; why the job ended early, if it did."""
    reader = EventReader(launch.events)
    try:
        while True:
            ended = engine.code() is not None
            decided = launch.outcome.exists()
            for event in reader.new():
                for observer in observers:
                    observer(event)
            if decided:
                return reason_of(launch)
            if ended:
                raise EngineError(
                    f"the engine must run to the job's end, got exit code {engine.code()}. Its log is {engine.log}; "
                    f"it ends with:\n{engine.tail()}"
                )
            time.sleep(_POLL)
    finally:
        reader.close()


def reason_of(launch: Launch) -> str:
    """Why a job ended early, if it did.

    Raises:
        SflError: What the job raised, where its server ran.
    """
    outcome = json.loads(launch.outcome.read_text(encoding="utf-8"))
    if outcome["error"] is None:
        return str(outcome["reason"])
    kind: object = getattr(errors, str(outcome["error"]), None)
    failure: SflError = EngineError(f"{outcome['error']}: {outcome['message']}")
    if isinstance(kind, type) and issubclass(kind, SflError) and kind is not errors.MissingExtraError:
        failure = kind(outcome["message"])
    failure.add_note(str(outcome["traceback"]))
    raise failure
