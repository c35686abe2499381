"""Looking at a federation and its jobs, ending a job, bringing one home."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sfl.env.checks import require

if TYPE_CHECKING:
    from sfl.engine.nvflare.admin import FederationState

Kit = Annotated[Path, Parameter(help="Folder of an admin's kit.")]
Job = Annotated[str, Parameter(help="The job's id, as submit has said it.")]


def status(job: str = "", *, startup_kit: Kit, json: bool = False) -> int:
    """Show server, connected sites and jobs.

    Args:
        job: Show this job alone.
        startup_kit: Folder of an admin's kit.
        json: As JSON.
    """
    _ready(startup_kit)
    from sfl.engine.nvflare.admin import admin, look

    with admin(startup_kit) as session:
        state = look(session, job)
    sys.stdout.write(as_json(state) if json else as_table(state))
    return 0


def abort(job: Job, *, startup_kit: Kit) -> int:
    """End a job that waits or runs."""
    _ready(startup_kit)
    from sfl.engine.nvflare.admin import admin, end

    with admin(startup_kit) as session:
        sys.stdout.write(f"{job} has ended: {end(session, job).status}\n")
    return 0


def download(job: Job, *, startup_kit: Kit, out: Path | None = None, wait: bool = False) -> int:
    """Bring home what a job has made, once it has ended: checkpoints, metrics, report.

    Args:
        job: The job's id, as submit has said it.
        startup_kit: Folder of an admin's kit.
        out: The run's folder, as submit has begun it, or a new one; by default runs/<job>.
        wait: Wait for a job that still runs.
    """
    _ready(startup_kit)
    from sfl.env.production import bring_home

    folder = out or Path("runs") / job
    reason = bring_home(startup_kit, job, folder, wait=wait)
    sys.stdout.write(f"{job} is in {folder}{f': {reason}' if reason else ''}\n")
    return 0


def as_json(state: FederationState) -> str:
    """A federation's state as JSON."""
    return json.dumps(asdict(state), indent=2) + "\n"


def as_table(state: FederationState) -> str:
    """A federation's state for people."""
    lines = [f"server  {state.server}", f"sites   {', '.join(state.sites) or 'none is connected'}"]
    if not state.jobs:
        return "\n".join([*lines, "jobs    none"]) + "\n"
    rows = [("job", "name", "status", "submitted", "took", "by")]
    rows += [(job.id, job.name, job.status, job.submitted, job.duration, job.submitter) for job in state.jobs]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        lines.append("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines) + "\n"


def _ready(kit: Path) -> None:
    from sfl.env.production import check_kit

    check_kit(kit)
    require("nvflare")
