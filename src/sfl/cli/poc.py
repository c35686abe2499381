"""A federation of one's own on this machine, to rehearse with: its processes run until they are stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sfl.cli.applications import APPLICATIONS, ConfigFile, Entry, RunFolder
from sfl.cli.jobs import as_json, as_table
from sfl.cli.options import with_options
from sfl.cli.submit import submit_job, sum_demo
from sfl.env.checks import require
from sfl.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from sfl.engine.nvflare.standing import Standing

Workspace = Annotated[Path, Parameter(help="Folder of the federation.")]
HOME = Path("poc")


def prepare(*, num_clients: int = 2, workspace: Workspace = HOME) -> int:
    """Provision a server, sites and an admin of this machine.

    Args:
        num_clients: Number of sites.
        workspace: Folder of the federation; made anew.
    """
    standing = _standing(workspace)
    standing.prepare(num_clients)
    sites = standing.sites
    sys.stdout.write(f"prepared a server and {len(sites)} sites in {workspace}: {', '.join(sites)}\n")
    return 0


def start(*, workspace: Workspace = HOME) -> int:
    """Start server and sites, and wait until the sites are connected. They run until `sfl poc stop`."""
    standing = _standing(workspace)
    standing.start()
    sys.stdout.write(
        f"up: a server and {', '.join(standing.sites)}; logs are in {standing.logs}, "
        f"the admin's kit is {standing.admin_kit}\n"
    )
    return 0


def status(*, workspace: Workspace = HOME, json: bool = False) -> int:
    """Show which participants run, who is connected, and the jobs; fails unless all run.

    Args:
        workspace: Folder of the federation.
        json: As JSON.
    """
    standing = _standing(workspace)
    dead = [name for name, alive in standing.processes().items() if not alive]
    if len(dead) == len(standing.sites) + 1:
        raise EngineError(f"the federation in {workspace} must run, got one that does not. Start it: sfl poc start")
    if "server" in dead:
        raise EngineError(f"the server of {workspace} must run, got none. Restart: sfl poc stop, sfl poc start")
    from sfl.engine.nvflare.admin import admin, look

    with admin(standing.admin_kit) as session:
        state = look(session)
    sys.stdout.write(as_json(state) if json else as_table(state))
    if dead:
        raise EngineError(f"all sites must run, got {', '.join(dead)} ended. Restart: sfl poc stop, sfl poc start")
    return 0


def stop(*, workspace: Workspace = HOME) -> int:
    """End server and sites, and all that they have started."""
    ended = _standing(workspace).stop()
    sys.stdout.write(f"{'stopped' if ended else 'nothing runs'} in {workspace}\n")
    return 0


def clean(*, workspace: Workspace = HOME) -> int:
    """Remove the federation's folder, with its jobs and logs."""
    _standing(workspace).clean()
    sys.stdout.write(f"removed {workspace}\n")
    return 0


def _submits(entry: Entry) -> Callable[..., int]:
    def body(
        *, workspace: Workspace = HOME, config: ConfigFile = None, resume: RunFolder = None, **overrides: object
    ) -> int:
        if "startup_kit" in overrides:
            raise ConfigError(
                f"startup_kit must be left out, as the federation has its own. Or use: sfl submit {entry.name}"
            )
        standing = _standing(workspace)
        here = {"startup_kit": str(standing.admin_kit)}
        if resume is None:
            here["num_clients"] = str(len(standing.sites))
        return submit_job(entry, config, {**here, **overrides}, resume)

    body.__doc__ = f"{entry.summary[:-1]}: submit it to this federation, and do not wait for it."
    return with_options((entry.config,), body)


esm2 = _submits(APPLICATIONS["esm2"])
llm = _submits(APPLICATIONS["llm"])


def sum_(
    *,
    workspace: Workspace = HOME,
    num_rounds: int = 3,
    base_secret: float = 7.0,
    out: Path | None = None,
) -> int:
    """Submit the smallest federated job to this federation: one number per site is added up.

    Args:
        workspace: Folder of the federation.
        num_rounds: Number of federated rounds.
        base_secret: A site's secret is this plus the site's number.
        out: Folder of the run; by default runs/sum-<time>.
    """
    standing = _standing(workspace)
    return sum_demo(
        num_clients=len(standing.sites),
        num_rounds=num_rounds,
        base_secret=base_secret,
        startup_kit=standing.admin_kit,
        out=out,
    )


def _standing(workspace: Path) -> Standing:
    require("nvflare")
    from sfl.engine.nvflare.standing import Standing

    return Standing(workspace)
