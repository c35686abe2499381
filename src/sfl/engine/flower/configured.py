"""Apps whose job is said by Flower's own run configuration, for a Flower app of one's own (``flwr run``)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from sfl.engine.flower.apps import serve_launch, site_of
from sfl.engine.flower.client import Place, client_app
from sfl.engine.launch import Launch
from sfl.errors import EngineError
from sfl.io.tree import write_text

__all__ = ["Begin", "ClientApp", "ServerApp", "Written", "configured_client", "configured_server"]

_IDLE = 900.0  # seconds after which a process of sites that nobody asks anything ends; it begins anew when it is asked


@dataclass(frozen=True, slots=True)
class Written:
    """What a job is to its processes.

    Attributes:
        num_clients: Sites that the server waits for.
        threads: CPU threads of each process.
        device: Where sites compute.
    """

    num_clients: int
    threads: int
    device: str


Begin = Callable[[Mapping[str, Any], Launch], Written]
"""Writes what a process runs into a launch, from the run configuration: what sites run, or the recipe."""


def configured_server(begin: Begin, finish: Callable[[Mapping[str, Any], Launch], object]) -> ServerApp:
    """A server whose recipe follows from the run configuration.

    Args:
        begin: Writes the recipe.
        finish: Called once the job has ended well: exports what it made.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        options = dict(context.run_config)
        home = _home(context)
        out = Path(str(options.get("out") or home / "run")).absolute()
        launch = _launch(home, "server", options, begin, {"out": str(out), "server": str(home)})
        serve_launch(launch, grid, "Flower")
        if error := launch.read_error():
            raise EngineError(f"the job must run to its end, got {error}.")
        finish(options, launch)

    return app


def configured_client(begin: Begin) -> ClientApp:
    """A site whose work follows from the run configuration.

    Args:
        begin: Writes what sites run.
    """

    def place(context: Context) -> Place:
        site, home = site_of(context), _home(context)
        here = {"sites": str(home / "sites"), "names": [site], "idle": _IDLE}
        launch = _launch(home, f"site-{context.node_id}", dict(context.run_config), begin, here)
        return Place(launch, site, site, os.getppid())

    return client_app(place)


def _home(context: Context) -> Path:
    """Where this machine keeps what belongs to the run."""
    root = Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")).absolute() / "sfl-runs"
    home = root / f"flower-{context.run_id}"
    (home / "logs").mkdir(parents=True, exist_ok=True)
    return home


def _launch(home: Path, name: str, options: Mapping[str, Any], begin: Begin, here: Mapping[str, Any]) -> Launch:
    launch = Launch(home / f"launch-{name}")
    if launch.folder.exists():
        return launch
    partial = Launch(Path(tempfile.mkdtemp(dir=home)))
    written = begin(options, partial)
    settings = {
        "names": [],
        "out": "",
        "resume": False,
        "sites": "",
        "workers": 0,
        "gpus": 0,
        "devices": [written.device],
        "threads": written.threads,
        "num_clients": written.num_clients,
        "logs": str(home / "logs"),
        **here,
    }
    write_text(partial.settings, json.dumps(settings, indent=1) + "\n")
    return partial.move(launch.folder)
