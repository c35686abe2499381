"""The Flower app of a launch: three small files that name our server and client, as ``flwr run`` takes them."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from sfl.engine.launch import Launch
from sfl.errors import ConfigError

_PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "sfl-job"
version = "1.0.0"
description = "One job of SFL."
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.34"]

[tool.flwr.app]
publisher = "sfl"
fab-format-version = 1
flwr-version-target = "1.34.0"

[tool.flwr.app.components]
serverapp = "sfl_job.server:app"
clientapp = "sfl_job.client:app"

[tool.flwr.app.config]
launch = "{launch}"
what = "{what}"
"""
_SERVER = '''"""The server of an SFL job."""

from sfl.engine.flower.apps import server_app

app = server_app(__file__)
'''
_CLIENT = '''"""The sites of an SFL job."""

from sfl.engine.flower.apps import site_app

app = site_app(__file__)
'''


def write_app(folder: Path, launch: Path | None, what: str) -> Path:
    """Write the app.

    Args:
        folder: Made for it.
        launch: The launch that its processes read; none if the app carries it.
        what: The engine in words.
    """
    package = folder / "sfl_job"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_PROJECT.format(launch=launch or "", what=what), encoding="utf-8")
    (folder / "LICENSE").write_text(
        "MIT, as SFL. These files name the job; they hold no code of their own.\n", encoding="utf-8"
    )
    (package / "__init__.py").write_text('"""One job of SFL."""\n', encoding="utf-8")
    (package / "server.py").write_text(_SERVER, encoding="utf-8")
    (package / "client.py").write_text(_CLIENT, encoding="utf-8")
    return folder


def carry(app: Path, launch: Launch, modules: Mapping[str, Path]) -> None:
    """Put a launch and the user's own modules into an app, for machines that share no disk.

    Flower hands one bundle to everybody, so sites get the server's recipe, too. It takes text files alone, so the
    recipe travels as text.

    Args:
        app: The app's folder.
        launch: What it carries.
        modules: The user's own modules, by name.

    Raises:
        ConfigError: If Flower would leave a module out.
    """
    carried = carried_in(app / "sfl_job")
    carried.mkdir()
    recipe = base64.b64encode(launch.recipe.read_bytes()).decode()
    (carried / "recipe.json").write_text(json.dumps({"safetensors": recipe}), encoding="utf-8")
    shutil.copy(launch.settings, carried)
    shutil.copy(launch.program, carried)
    for name, path in modules.items():
        if name.startswith("test_") or name.endswith("_test") or name == "sfl_job":
            raise ConfigError(f"a module that travels in a Flower app must not be named like a test, got {name!r}.")
        if path.is_dir():
            shutil.copytree(path, app / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
        else:
            shutil.copy(path, app / f"{name}.py")


def carried_in(package: Path) -> Path:
    """Where an app's package holds the launch that it carries."""
    return package / "launch"
