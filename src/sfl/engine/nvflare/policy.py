"""FLARE builds only components that a site's policy names: ours, beside FLARE's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

COMPONENTS = ("sfl.engine.nvflare.controller.SflController", "sfl.engine.nvflare.executor.SflExecutor")
_KEY = "class_allow_list"
_FILE = "resources.json"


def allow_components(local: Path) -> None:
    """Name our two components in the policy of a site.

    Args:
        local: The site's ``local`` folder; its ``resources.json`` is made from the default beside it, if missing.
    """
    resources = _resources(local)
    allowed = list(resources.get(_KEY, DEFAULT_CLASS_ALLOW_LIST))
    resources[_KEY] = allowed + [name for name in COMPONENTS if name not in allowed]
    _write(local, resources)


def store_jobs_in(local: Path, storage: Path) -> None:
    """Keep a server's jobs and snapshots in a folder of its own: FLARE's default is one for all servers of a machine.

    Args:
        local: The server's ``local`` folder.
        storage: The folder, on the machine that the server will run on.
    """
    resources = _resources(local)
    persistor = resources["snapshot_persistor"]["args"]["storage"]["args"]
    persistor["root_dir"] = str(storage / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(storage / "jobs")
    _write(local, resources)


def _resources(local: Path) -> dict[str, Any]:
    known = next((path for path in (local / _FILE, local / f"{_FILE}.default") if path.is_file()), None)
    return json.loads(known.read_text(encoding="utf-8")) if known is not None else {}


def _write(local: Path, resources: dict[str, Any]) -> None:
    local.mkdir(parents=True, exist_ok=True)
    (local / _FILE).write_text(json.dumps(resources, indent=2) + "\n", encoding="utf-8")
