"""The ServerApp and the ClientApp of a deployed job: what they run is said by Flower's run configuration."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from sfl.engine.flower.carried import carried_by_server, carried_by_site, remembered_sites
from sfl.engine.flower.client import Place, client_app
from sfl.engine.flower.home import bring_home, telling
from sfl.engine.flower.server import WAIT, FlowerEngine
from sfl.engine.kit import use_kit
from sfl.engine.launch import Launch, resolve_server
from sfl.errors import EngineError
from sfl.types import site_names


def server_app(module: str) -> ServerApp:
    """The server of the launch that the run configuration names, or that the app carries.

    Args:
        module: File of the app's module.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        named, what = str(context.run_config["launch"]), str(context.run_config["what"])
        if named:
            serve_launch(Launch(Path(named)), grid, what)
            return
        launch = carried_by_server(module, context.run_id)
        with telling(launch):
            serve_launch(launch, grid, what)
        bring_home(launch)

    return app


def serve_launch(launch: Launch, grid: Grid, what: str) -> None:
    """Run the job of a launch over Flower's nodes; how it ended is in its outcome."""
    settings = launch.read_settings()
    names = list(settings["names"])

    def engine() -> FlowerEngine:
        if "server" not in settings:
            return FlowerEngine(grid, names, wait=float(settings.get("wait", WAIT)), what=what)
        connected = FlowerEngine(grid, names or int(settings["num_clients"]), what=what, dismiss=True)
        remembered_sites(launch, connected.clients())
        return connected

    resolve_server()(launch, engine)


def site_app(module: str) -> ClientApp:
    """The site that a node's own configuration names. Its process lives as long as the node's.

    Args:
        module: File of the app's module.
    """

    def place(context: Context) -> Place:
        site = site_of(context)
        if "kit" in context.node_config:
            use_kit(str(context.node_config["kit"]))
        named = str(context.run_config["launch"])
        launch = Launch(Path(named)) if named else carried_by_site(module, context.run_id, site)
        return Place(launch, site, site, os.getppid())

    return client_app(place)


def site_of(context: Context) -> str:
    """The name that a node's operator gave it.

    Raises:
        EngineError: If its configuration holds none.
    """
    named = context.node_config
    for key in ("site", "client-name"):  # the latter is what FLARE's Flower integration says
        if key in named:
            return str(named[key])
    try:
        return site_names(int(named["num-partitions"]))[int(named["partition-id"])]
    except (KeyError, ValueError, IndexError) as error:
        raise EngineError(
            f"a node must be started with --node-config 'site=\"NAME\"' or 'partition-id=N num-partitions=M', got "
            f"{dict(named)}."
        ) from error
