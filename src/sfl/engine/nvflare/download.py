"""Bringing home what a job has made on a provisioned server."""

from __future__ import annotations

import shutil
from pathlib import Path

from nvflare.fuel.flare_api.flare_api import Session

from sfl.engine.launch import Launch
from sfl.engine.nvflare.carried import RESULT
from sfl.engine.nvflare.job import CARRIED
from sfl.io.tree import write_text


def download(session: Session, job: str, launch: Launch, *, offset: int = 0) -> bool:
    """Bring the rest of the events, the run folder and, last, the outcome of a job that has ended into ``launch``.

    Args:
        session: An admin's.
        job: FLARE's name of the job.
        launch: Where it is put; its settings become those that the job carried, unless it has some.
        offset: How many bytes of events are there already.

    Returns:
        Whether the job was one of ours and came far enough to have an outcome.
    """
    place = Path(session.download_job_result(job, str(launch.folder / "download")))
    made = next((path.parent for path in place.rglob(f"{CARRIED}/{launch.outcome.name}")), None)
    if made is None:
        return False
    theirs = Launch(made)
    if (made / RESULT).is_dir():
        shutil.copytree(made / RESULT, launch.folder / RESULT, dirs_exist_ok=True)
    if theirs.final.exists():
        shutil.copy(theirs.final, launch.final)
    if not launch.settings.exists():
        shutil.copy(theirs.settings, launch.settings)
    with theirs.events.open("rb") as rest, launch.events.open("ab") as file:
        rest.seek(offset)
        shutil.copyfileobj(rest, file)
    write_text(launch.outcome, theirs.outcome.read_text(encoding="utf-8"))
    return True
