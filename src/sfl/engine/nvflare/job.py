"""A FLARE job folder that runs a launch: configuration, and the user's own code where sites do not have it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfl.engine.launch import Launch
from sfl.engine.nvflare.messages import OTHER, TASKS
from sfl.engine.owner import KEY, PROOF, sign

_POLL = 0.1  # seconds between two fetches of a task; FLARE's own is 2
_START = 240  # seconds in which Flower and its nodes must have started; of 10, FLARE's own, a busy machine needs more
CARRIED = "sfl"
"""Where a job that carries its launch holds it, inside its configuration."""
ORDER = "order.json"
"""The settings of a launch whose run has an owner, as they were signed; those of others lie where they are read."""


def write_job(folder: Path, name: str, launch: Path, sites: Sequence[str], what: str) -> Path:
    """Write a job whose processes read the launch where it lies: for engines on this machine.

    Args:
        folder: Where the job's folder is made.
        name: The job's name.
        launch: The launch that its processes read.
        sites: The sites that it needs.
        what: The engine in words.

    Returns:
        The job's folder.
    """
    job = folder / name
    config = job / "app" / "config"
    _write(job / "meta.json", _meta(name, sites, {"app": ["@ALL"]}))
    _write(config / "config_fed_server.json", _server_config(str(launch), what))
    _write(config / "config_fed_client.json", _client_config(str(launch)))
    return job


def write_carrying_job(folder: Path, name: str, launch: Launch, sites: Sequence[str]) -> Path:
    """Write a job that carries its launch, for machines that share no disk. Sites do not get the server's recipe.

    The files that the launch's settings name as ``code`` travel as FLARE's custom code, which makes the job one that
    needs the right to bring code. What the settings say of this machine stays here. With the key of its run, which lies
    in the launch and stays there, the job is signed; without one it names no run.

    Args:
        folder: Where the job's folder is made.
        name: The job's name.
        launch: What it carries; it learns which sites it is for.
        sites: The sites that it needs.

    Returns:
        The job's folder.
    """
    job = folder / name
    launch.add_settings(names=list(sites))
    settings = launch.read_settings()
    code = {str(place): Path(source) for place, source in settings.pop("code").items()}
    _write(job / "meta.json", _meta(name, sites, {"server_app": ["server"], "site_app": list(sites)}))
    what = f"NVIDIA FLARE, {len(sites)} provisioned sites, mutual TLS"
    _write(job / "server_app" / "config" / "config_fed_server.json", _server_config("", what))
    _write(job / "site_app" / "config" / "config_fed_client.json", _client_config(""))
    is_owned = (launch.folder / KEY).is_file()
    said = ORDER if is_owned else launch.settings.name
    server, site = (job / app / "config" / CARRIED for app in ("server_app", "site_app"))
    for carried, files in ((server, (launch.program, launch.recipe)), (site, (launch.program,))):
        _write(carried / said, {**settings, "logs": ""})
        for file in files:
            shutil.copy(file, carried)
        for place, source in code.items():
            _copy(source, carried.parents[1] / "custom" / place)
    if is_owned:
        sign(server, (launch.folder / KEY).read_bytes(), (ORDER, launch.program.name, launch.recipe.name))
        shutil.copy(server / PROOF, site)
    return job


def write_flower_job(folder: Path, name: str, app: Path, sites: Sequence[str]) -> Path:
    """Write a job that runs a Flower app through FLARE's Flower integration, over FLARE's own channels.

    Args:
        folder: Where the job's folder is made.
        name: The job's name.
        app: The Flower app.
        sites: The sites that it needs.

    Returns:
        The job's folder.
    """
    job = folder / name
    integration = "nvflare.app_opt.flower"
    controller = {
        "id": "flower",
        "path": f"{integration}.controller.FlowerController",
        "args": {
            **dict.fromkeys(("superlink_ready_timeout", "configure_task_timeout", "start_task_timeout"), _START),
            "monitor_interval": 0.2,
            "job_status_check_interval": 0.5,
        },
    }
    executor = {"path": f"{integration}.executor.FlowerExecutor", "args": {"client_shutdown_timeout": 2.0}}
    config = job / "app" / "config"
    _write(job / "meta.json", _meta(name, sites, {"app": ["@ALL"]}))
    _write(
        config / "config_fed_server.json",
        {**_COMMON, "server": {"task_request_interval": _POLL}, "workflows": [controller]},
    )
    _write(config / "config_fed_client.json", {**_COMMON, "executors": [{"tasks": ["*"], "executor": executor}]})
    shutil.copytree(app, job / "app" / "custom")
    return job


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def _meta(name: str, sites: Sequence[str], deploy: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        "name": name,
        "resource_spec": {},
        "min_clients": len(sites),
        "mandatory_clients": list(sites),
        "deploy_map": {app: list(where) for app, where in deploy.items()},
    }


def _server_config(launch: str, what: str) -> dict[str, Any]:
    controller = {
        "id": "sfl",
        "path": "sfl.engine.nvflare.controller.SflController",
        "args": {"launch": launch, "what": what},
    }
    return {**_COMMON, "server": {"task_request_interval": _POLL}, "workflows": [controller]}


def _client_config(launch: str) -> dict[str, Any]:
    executor = {"path": "sfl.engine.nvflare.executor.SflExecutor", "args": {"launch": launch}}
    tasks = [*TASKS.values(), OTHER]
    return {
        **_COMMON,
        "default_task_fetch_interval": _POLL,
        "executors": [{"tasks": tasks, "executor": executor}],
    }


_COMMON: Mapping[str, Any] = {
    "format_version": 2,
    "task_data_filters": [],
    "task_result_filters": [],
    "components": [],
}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
