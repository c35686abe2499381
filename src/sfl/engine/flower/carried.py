"""A launch that a Flower app carries: unpacked where SuperLink or SuperNode run, with folders that outlive the run.

Everything lies in ``FLWR_HOME`` of the machine, under ``sfl-runs/<run id>``: what the server has done, what sites
remember, logs. A run that is submitted again with the same id goes on from there.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from sfl.engine.flower.app_folder import carried_in
from sfl.engine.launch import Launch
from sfl.errors import EngineError
from sfl.io.tree import write_text

RESULT = "run"
MOST = 1 << 30
"""Bytes of results that come home: gRPC hands over 2 GiB at once, and base64 makes a third more of them."""
_RUN = re.compile(r"[0-9a-f]{32}")
_HOME = "sfl-runs"
_IDLE = 900.0  # seconds after which a process of sites that nobody asks anything ends; it begins anew when it is asked


def carried_by_server(module: str, run: int) -> Launch:
    """The launch of the server's app.

    Args:
        module: File of the app's module.
        run: Flower's number of the run.
    """
    launch, home = _unpacked(module, f"server-{run}")
    launch.add_settings(out=str(home / RESULT), logs=str(home / "logs"), server=str(home), most=MOST)
    return launch


def carried_by_site(module: str, run: int, site: str) -> Launch:
    """The launch of a site's app; the user's modules that it brought are importable in the site's processes.

    Args:
        module: File of the app's module.
        run: Flower's number of the run.
        site: The site's name.
    """
    launch, home = _unpacked(module, f"{_plain(site)}-{run}")
    if "idle" not in launch.read_settings():
        launch.add_settings(sites=str(home / "sites"), logs=str(home / "logs"), names=[site], idle=_IDLE)
    app = str(Path(module).parents[1])
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if app not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([app, *filter(None, known)])
    return launch


def remembered_sites(launch: Launch, sites: list[str]) -> None:
    """Hold a run to the sites that it was begun with: their order is part of it.

    Raises:
        EngineError: If they are others.
    """
    note = Path(launch.read_settings()["server"]) / "sites.json"
    if not note.exists():
        write_text(note, json.dumps(sites) + "\n")
    begun = list(json.loads(note.read_text(encoding="utf-8")))
    if begun != sites:
        raise EngineError(f"a run must go on with the sites {', '.join(begun)}, got {', '.join(sites)}.")


def _unpacked(module: str, name: str) -> tuple[Launch, Path]:
    packed = carried_in(Path(module).parent)
    run = str(Launch(packed).read_settings()["run"])
    if not _RUN.fullmatch(run):
        raise EngineError(f"a run id must be 32 hexadecimal digits, got {run!r}.")
    home = Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")).absolute() / _HOME / run
    (home / "logs").mkdir(parents=True, exist_ok=True)
    launch = Launch(home / f"launch-{name}")
    if not launch.folder.exists():
        partial = Path(tempfile.mkdtemp(dir=home))
        shutil.copytree(packed, partial, dirs_exist_ok=True)
        partial.chmod(0o700)  # for this user alone: a door's secret will lie in it
        recipe = json.loads((partial / "recipe.json").read_text(encoding="utf-8"))["safetensors"]
        Launch(partial).recipe.write_bytes(base64.b64decode(recipe, validate=True))
        partial.rename(launch.folder)
    return launch, home


def _plain(site: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.@_-]{0,62}", site):
        raise EngineError(f"a site's name must be of letters, digits and . @ _ -, got {site!r}.")
    return site
