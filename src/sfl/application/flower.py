"""An application as a Flower app of one's own: its options are those of the app's run configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfl.application.config import RunConfig
from sfl.application.job import Application
from sfl.engine.flower.configured import ClientApp, ServerApp, Written, configured_client, configured_server
from sfl.engine.launch import Launch
from sfl.io.checkpoint import load_state
from sfl.io.run_folder import RunFolder
from sfl.io.tree import save_tree
from sfl.recipe import Recipe
from sfl.utils.config import resolve
from sfl.utils.plain import describe

__all__ = ["client_app", "server_app"]


def client_app(application: Application[Any], kind: type[RunConfig]) -> ClientApp:
    """The sites of an application.

    Args:
        application: What they run.
        kind: Its options.
    """

    def begin(options: Mapping[str, Any], launch: Launch) -> Written:
        config, recipe = _recipe(application, kind, options)
        launch.write_program(recipe.build().program)
        return _written(config)

    return configured_client(begin)


def server_app(application: Application[Any], kind: type[RunConfig]) -> ServerApp:
    """The server of an application; what it makes lies in the folder that the option ``out`` names.

    Args:
        application: What it runs.
        kind: Its options.
    """

    def begin(options: Mapping[str, Any], launch: Launch) -> Written:
        config, recipe = _recipe(application, kind, options)
        save_tree(launch.recipe, describe(recipe, "the recipe"))
        return _written(config)

    def finish(options: Mapping[str, Any], launch: Launch) -> None:
        config, _ = _recipe(application, kind, options)
        folder = RunFolder(Path(launch.read_settings()["out"]))
        application.export(config, load_state(launch.final).parameters, folder, logging.getLogger(__name__).info)

    return configured_server(begin, finish)


def _recipe(
    application: Application[Any], kind: type[RunConfig], options: Mapping[str, Any]
) -> tuple[RunConfig, Recipe]:
    """The recipe of what ``[tool.flwr.app.config]`` says, in Flower's spelling of names.

    Raises:
        ConfigError: If an option is none, or has a value that it must not.
    """
    named = {name.replace("-", "_"): value for name, value in options.items()}
    config = resolve(kind, yaml_files=(), environ={}, overrides=named).config
    return config, application.job(config, lambda _: None)


def _written(config: RunConfig) -> Written:
    federation = config.federation
    return Written(num_clients=federation.num_clients, threads=federation.threads, device=config.client.device)
