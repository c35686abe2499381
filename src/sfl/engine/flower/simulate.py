"""The process of one Flower simulation: ``python -m sfl.engine.flower.simulate FOLDER``."""

from __future__ import annotations

import os
import sys
import threading
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from sfl.engine.flower.client import Place, client_app
from sfl.engine.flower.server import FlowerEngine
from sfl.engine.launch import Launch, resolve_server
from sfl.engine.site_process import home_of

_THEIRS = 0.1  # seconds between two looks of Flower's simulation
_LOOK = 0.01  # of ours …
_LOOK_OF_ONE = 0.001  # … and at least so much for each node, as a look asks for every node's messages


def simulate(launch: Launch) -> None:
    """Run the job of ``launch`` over virtual nodes."""
    launch.add_settings(keeper=os.getpid())
    settings = launch.read_settings()
    names = list(settings["names"])
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower hands it over
        what = f"Flower simulation, {settings['workers']} workers"
        abreast = int(settings["workers"]) + 1
        resolve_server()(launch, lambda: FlowerEngine(grid, names, what=what, abreast=abreast))

    _look_sooner(max(_LOOK, _LOOK_OF_ONE * len(names)))
    run_simulation(
        server_app=app,
        client_app=client_app(partial(_place, str(launch.folder), tuple(names))),
        num_supernodes=len(names),
        backend_config=_backend(settings, str(launch.folder / "ray")),
    )


def _look_sooner(pause: float) -> None:
    """Let Flower's simulation look for messages to its nodes more often than every 0.1 s, which is all that a round of
    little work waits for. A Flower that does this elsewhere is left as it is.
    """
    try:
        home: Any = import_module("flwr.server.superlink.fleet.vce.vce_api")
        theirs: Any = home.add_messages_to_queue
    except (ModuleNotFoundError, AttributeError):
        return
    if pause >= _THEIRS:
        return

    def ours(*given: Any, **named: Any) -> None:
        theirs(*(_sooner(one, pause) for one in given), **{name: _sooner(one, pause) for name, one in named.items()})

    home.add_messages_to_queue = ours


def _sooner(given: Any, pause: float) -> Any:
    return _Sooner(given, pause) if isinstance(given, threading.Event) else given


class _Sooner:
    """An event whose waits are shorter."""

    def __init__(self, event: threading.Event, pause: float) -> None:
        self._event, self._pause = event, pause

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._event.wait(self._pause if timeout is None else min(timeout, self._pause))


def _place(folder: str, names: tuple[str, ...], context: Context) -> Place:
    launch, site = Launch(Path(folder)), names[int(context.node_config["partition-id"])]
    return Place(launch, site, *home_of(launch, site))


def _backend(settings: dict[str, Any], ray_folder: str) -> dict[str, Any]:
    """One CPU for each worker, so many workers at a time; everything that Ray writes lies in one folder."""
    workers, gpus = int(settings["workers"]), int(settings["gpus"])
    init = {"num_cpus": workers, "num_gpus": gpus, "include_dashboard": False, "_temp_dir": ray_folder}
    resources = {"num_cpus": 1, "num_gpus": 1.0 if gpus else 0.0}
    return {"init_args": init, "client_resources": resources}


if __name__ == "__main__":
    simulate(Launch(Path(sys.argv[1])))
