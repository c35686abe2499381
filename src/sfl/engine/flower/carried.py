"""A launch that a Flower app carries: unpacked where SuperLink or SuperNode run, with folders that outlive the run.

Everything lies in ``FLWR_HOME`` of the machine, under ``sfl-runs/<run id>``: what the server has done, what sites
remember, logs. Who has the run's key can submit it again, and it goes on from there; see `engine.owner`. Of what the
app says, only what is known is taken, and nothing that leads to a place on this machine.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfl.engine.flower.app_folder import SIGNED, carried_in
from sfl.engine.launch import Launch
from sfl.engine.owner import Order, read_order
from sfl.errors import EngineError
from sfl.io.tree import write_text

RESULT = "run"
MOST = 1 << 30
"""Bytes of results that come home: gRPC hands over 2 GiB at once, and base64 makes a third more of them."""
_HOME = "sfl-runs"
_TAKEN = ("names", "resume", "workers", "gpus", "devices", "num_clients", "threads", "job", "reader")
_IDLE = 900.0  # seconds after which a process of sites that nobody asks anything ends; it begins anew when it is asked


@dataclass(frozen=True, slots=True)
class Place:
    """Where an app is unpacked.

    Attributes:
        name: Of the server or the site.
        run: Flower's number of the run.
        here: Settings that this machine makes.
    """

    name: str
    run: int
    here: Mapping[str, Any]


def carried_by_server(module: str, run: int) -> Launch:
    """The launch of the server's app.

    Args:
        module: File of the app's module.
        run: Flower's number of the run.
    """
    home, order = _home(module)
    here = {"out": str(home / RESULT), "server": str(home), "most": MOST}
    return _unpacked(module, home, order, Place("server", run, here))


def carried_by_site(module: str, run: int, site: str) -> Launch:
    """The launch of a site's app; the user's modules that it brought are importable in the site's processes.

    Args:
        module: File of the app's module.
        run: Flower's number of the run.
        site: The site's name.
    """
    home, order = _home(module)
    app = str(Path(module).absolute().parents[1])
    here = {"sites": str(home / "sites"), "names": [site], "idle": _IDLE, "code": app, "deployed": True}
    launch = _unpacked(module, home, order, Place(f"site-{_plain(site)}", run, here))
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


def _home(module: str) -> tuple[Path, Order]:
    """Where the run of an app is kept, and the order that the app brings."""
    order = read_order(carried_in(Path(module).parent), SIGNED)
    home = Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")).absolute() / _HOME / order.run
    home.parent.mkdir(parents=True, exist_ok=True)
    home.mkdir(mode=0o700, exist_ok=True)
    return home, order


def _unpacked(module: str, home: Path, order: Order, place: Place) -> Launch:
    packed, launch = Launch(carried_in(Path(module).parent)), Launch(home / f"launch-{place.name}-{place.run}")
    (home / "logs").mkdir(exist_ok=True)
    if launch.folder.exists():
        return launch
    order.take(home / f"order-{place.name}.json", str(place.run))
    partial = Launch(Path(tempfile.mkdtemp(dir=home)))  # for this user alone: a door's secret will lie in it
    given = packed.read_settings()
    taken = {name: given[name] for name in _TAKEN if name in given}
    rest = {"out": "", "sites": "", "logs": str(home / "logs"), "run": order.run}
    write_text(partial.settings, json.dumps({**taken, **rest, **place.here}, indent=1) + "\n")
    shutil.copy(packed.program, partial.program)
    recipe = json.loads((packed.folder / "recipe.json").read_text(encoding="utf-8"))["safetensors"]
    partial.recipe.write_bytes(base64.b64decode(recipe, validate=True))
    return partial.move(launch.folder)


def _plain(site: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.@_-]{0,62}", site):
        raise EngineError(f"a site's name must be of letters, digits and . @ _ -, got {site!r}.")
    return site
