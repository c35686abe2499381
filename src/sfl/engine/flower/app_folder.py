"""The Flower app of a launch: three small files that name our server and client, as ``flwr run`` takes them."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from sfl.engine.launch import Launch
from sfl.errors import ConfigError

SIGNED = ("launch.json", "program.json", "recipe.json")
"""What an app carries of a launch, all of it under its owner's signature."""

_MOST = 10 << 20  # bytes that Flower takes as an app
_TAKEN = {"sfl_job", "build", "eggs", "lib", "lib64", "parts", "env", "venv", "ENV"}  # at an app's root
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


def carry(app: Path, launch: Launch, code: Mapping[str, Path]) -> None:
    """Put a launch and the user's own code into an app, for machines that share no disk.

    Flower hands one bundle to everybody, so sites get the server's recipe, too. It takes text files alone, so the
    recipe travels as text.

    Args:
        app: The app's folder.
        launch: What it carries.
        code: The user's own code: where it lies in the app, and where it lies here.

    Raises:
        ConfigError: If it is too much for Flower, or Flower would leave some of it out.
    """
    size = launch.recipe.stat().st_size
    if size > _MOST:
        raise ConfigError(
            f"a recipe must fit into a Flower app's {_MOST >> 20} MiB, got {size / 2**20:.3g} MiB: it holds the "
            "initial parameters. Give a function that makes them on the server, or run it with --backend nvflare-prod."
        )
    carried = carried_in(app / "sfl_job")
    carried.mkdir()
    recipe = base64.b64encode(launch.recipe.read_bytes()).decode()
    (carried / "recipe.json").write_text(json.dumps({"safetensors": recipe}), encoding="utf-8")
    shutil.copy(launch.settings, carried)
    shutil.copy(launch.program, carried)
    for place, path in code.items():
        _check_carried(Path(place), path)
        target = app / place
        target.parent.mkdir(exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
        else:
            shutil.copy(path, target)


def _check_carried(place: Path, path: Path) -> None:
    """Refuse what Flower would leave out of an app without a word."""
    if place.stem.startswith("test_") or place.stem.endswith("_test"):
        raise ConfigError(f"code that travels in a Flower app must not be named like a test, got {place.stem!r}.")
    if str(place) in _TAKEN:
        raise ConfigError(f"a package that travels in a Flower app must not be named {place}. Rename it.")
    if not path.is_dir() and place.suffix != ".py":
        raise ConfigError(f"code that travels in a Flower app must be named *.py, got {path.name!r}. Rename it.")


def carried_in(package: Path) -> Path:
    """Where an app's package holds the launch that it carries."""
    return package / "launch"
