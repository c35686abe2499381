"""A federation of this machine that stands until it is stopped: server and sites as processes, with kits of their own.

``python -m sfl.engine.nvflare.standing FOLDER`` is the process that starts them, and ends them when it is told to. All
of them, and what they start, carry a mark in their environment, so that none can be left behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from sfl.engine.guard import end_marked, marked
from sfl.engine.nvflare.admin import admin, look
from sfl.engine.nvflare.federation import ADMIN, SERVER, on_this_machine
from sfl.engine.nvflare.participants import listens, start
from sfl.engine.nvflare.provision import provision
from sfl.engine.ports import free_ports
from sfl.errors import ConfigError, EngineError
from sfl.io.tree import write_text
from sfl.types import site_names

MARK = "_SFL_POC"
"""Not the mark of a run: a process that carries this one takes no job by the name of a folder."""
_START = 120.0  # seconds that server and sites get to find each other
_LOOK = 0.2


@dataclass(frozen=True, slots=True)
class Standing:
    """The federation in a folder.

    Attributes:
        folder: The folder; everything that the federation is lies in it.
    """

    folder: Path

    @property
    def kits(self) -> Path:
        """The folder that holds a kit under each participant's name."""
        return self.folder / "kits"

    @property
    def admin_kit(self) -> Path:
        """The kit with which jobs are submitted."""
        return self.kits / ADMIN

    @property
    def logs(self) -> Path:
        """What the participants say."""
        return self.folder / "logs"

    @property
    def mark(self) -> str:
        """What the federation's processes carry in their environment."""
        return hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of its sites.

        Raises:
            ConfigError: If the folder holds no federation.
        """
        return tuple(self._settings()["sites"])

    @property
    def port(self) -> int:
        """On which its server listens.

        Raises:
            ConfigError: If the folder holds no federation.
        """
        return int(self._settings()["port"])

    @property
    def is_running(self) -> bool:
        """Whether any process of it is there."""
        return bool(marked(self.mark, MARK))

    def prepare(self, num_clients: int) -> None:
        """Provision server, sites and an admin, with certificates of their own and a port that is free now.

        Raises:
            ConfigError: If the folder holds something, or there is to be no site.
        """
        if num_clients < 1:
            raise ConfigError(f"num_clients must be at least 1, got {num_clients}.")
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(
                f"workspace must be a new or empty folder, got {self.folder}. "
                "Choose another, or remove what was prepared there: sfl poc clean"
            )
        sites, (port,) = site_names(num_clients), free_ports(1)
        making = self.folder / "making"
        made = provision(on_this_machine(sites, port), making, storage=self.folder.absolute() / "storage")
        made.rename(self.kits)
        shutil.rmtree(making)  # the authority's key with it: nobody can be added
        self.logs.mkdir()
        write_text(self._state, json.dumps({"sites": sites, "port": port}) + "\n")

    def start(self) -> None:
        """Start server and sites, and wait until all sites are connected. They outlive this process.

        Raises:
            ConfigError: If the folder holds no federation, or it runs already.
            EngineError: If its port is taken, or a participant ends or does not connect; then none is left running.
        """
        port = self.port
        if self.is_running:
            raise ConfigError(
                f"the federation in {self.folder} must not run yet, got one that does. See sfl poc status."
            )
        if listens(port):
            raise EngineError(
                f"port {port} of {self.folder} must be free, got one that somebody listens on. "
                "Take another with: sfl poc clean, sfl poc prepare"
            )
        self._running.unlink(missing_ok=True)
        environ = {**os.environ, MARK: self.mark}
        with (self.logs / "poc.log").open("ab") as log:
            keeper = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.folder.resolve())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ,
                cwd=self.folder,
                start_new_session=True,
            )
        try:
            self._wait(keeper, port)
        except BaseException:
            self.stop()
            keeper.wait()
            raise

    def processes(self) -> dict[str, bool]:
        """Which participants are running, by name."""
        known = self._known()
        alive = {process.pid for process in marked(self.mark, MARK) if process.status() != psutil.STATUS_ZOMBIE}
        return {name: known.get(name) in alive for name in (SERVER, *self.sites)}

    def stop(self) -> bool:
        """End every process of it, with all that they have started; whether there was any.

        Raises:
            EngineError: If one cannot be ended.
        """
        self._settings()
        if not self.is_running:
            return False
        for _ in range(3):  # a job may have started a process while the others were ended
            end_marked(self.mark, MARK)
            if not self.is_running:
                self._running.unlink(missing_ok=True)
                return True
        left = ", ".join(str(process.pid) for process in marked(self.mark, MARK))
        raise EngineError(f"every process of {self.folder} must end, got {left} still there. End them by hand.")

    def clean(self) -> None:
        """Remove the folder.

        Raises:
            ConfigError: If it holds no federation, or one that runs.
        """
        self._settings()
        if self.is_running:
            raise ConfigError(f"the federation in {self.folder} must be stopped first, got one that runs: sfl poc stop")
        shutil.rmtree(self.folder)

    @property
    def _state(self) -> Path:
        return self.folder / "poc.json"

    @property
    def _running(self) -> Path:
        return self.folder / "running.json"

    def _settings(self) -> Mapping[str, Any]:
        if not self._state.is_file():
            raise ConfigError(
                f"workspace must be a folder that was prepared, got {str(self.folder)!r}. Prepare it: sfl poc prepare"
            )
        return json.loads(self._state.read_text(encoding="utf-8"))

    def _known(self) -> dict[str, int]:
        with suppress(FileNotFoundError):
            return dict(json.loads(self._running.read_text(encoding="utf-8")))
        return {}

    def _wait(self, keeper: subprocess.Popen[bytes], port: int) -> None:
        deadline = time.monotonic() + _START
        while not listens(port):
            self._check(keeper, deadline, "the server must listen")
            time.sleep(_LOOK)
        with admin(self.admin_kit, _START) as session:
            while set(self.sites) - set(found := look(session).sites):
                self._check(keeper, deadline, f"all sites must connect, got {', '.join(found) or 'none'}")
                time.sleep(_LOOK)

    def _check(self, keeper: subprocess.Popen[bytes], deadline: float, what: str) -> None:
        dead = [name for name, alive in self.processes().items() if not alive] if self._known() else []
        if keeper.poll() is not None or dead or time.monotonic() > deadline:
            name = dead[0] if dead else "poc" if keeper.poll() is not None else SERVER
            log = self.logs / f"{name}.log"
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
            why = f"{name} has ended" if dead else "no answer in time"
            raise EngineError(f"{what}: {why}. Its log is {log}; it ends with:\n{tail}")


def keep(standing: Standing) -> None:
    """Start the participants and stay with them until this process is told to end; then end what is left."""
    over = threading.Event()

    def asked(_number: int, _frame: FrameType | None) -> None:
        over.set()

    signal.signal(signal.SIGTERM, asked)
    processes = start(standing.kits, standing.sites, standing.port, lambda name: standing.logs / f"{name}.log")
    write_text(standing.folder / "running.json", json.dumps({name: p.pid for name, p in processes.items()}) + "\n")
    while not over.wait(_LOOK):
        for process in processes.values():
            process.poll()  # waits for one that has ended, so that it is seen to be gone
    end_marked(standing.mark, MARK)


if __name__ == "__main__":
    keep(Standing(Path(sys.argv[1])))
