"""The process of one Flower simulation: ``python -m sfl.engine.flower.simulate FOLDER``."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from sfl.engine.flower.client import Place, client_app
from sfl.engine.flower.server import FlowerEngine
from sfl.engine.launch import Launch, resolve_server
from sfl.engine.site_process import home_of


def simulate(launch: Launch) -> None:
    """Run the job of ``launch`` over virtual nodes."""
    launch.add_settings(keeper=os.getpid())
    settings = launch.read_settings()
    names = list(settings["names"])
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower hands it over
        what = f"Flower simulation, {settings['workers']} workers"
        resolve_server()(launch, lambda: FlowerEngine(grid, names, what=what))

    run_simulation(
        server_app=app,
        client_app=client_app(partial(_place, str(launch.folder), tuple(names))),
        num_supernodes=len(names),
        backend_config=_backend(settings, str(launch.folder / "ray")),
    )


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
