"""Submitting a job with an admin's kit, and watching it to its end.

``python -m sfl.engine.nvflare.submit FOLDER KIT`` submits a job that carries its launch to a provisioned
federation, and brings back what it made.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from nvflare.fuel.flare_api.flare_api import Session

from sfl.engine.launch import Launch
from sfl.engine.nvflare.admin import FINISHED, await_sites, connect, why_failed
from sfl.engine.nvflare.controller import EVENTS
from sfl.engine.nvflare.download import download
from sfl.engine.nvflare.job import write_carrying_job

_LOOK = 1.0  # seconds between two looks at FLARE's status of the job
_GLANCE = 0.1  # seconds between two looks at a file
_START = 60.0  # seconds that a server which is starting gets


class _Asked(BaseException):
    """This process was asked to end. No handler of ordinary errors, ours or FLARE's, may keep it."""


@dataclass
class Submission:
    """One job of one admin.

    Attributes:
        session: The admin's session.
        launch: The run.
        job_id: FLARE's name of the job.
        shares_disk: Whether the server writes into the launch itself.
    """

    session: Session
    launch: Launch
    job_id: str
    shares_disk: bool
    offset: int = 0

    def watch(self) -> int:
        """Stay until the job has ended; 0 if FLARE calls it completed.

        Where the server writes into the launch itself, the job has ended once its outcome is there: sites have let
        their clients go by then, and FLARE's own tidying is of nothing that is kept.
        """
        while True:
            status = str(self.session.get_job_status(self.job_id))
            if not self.shares_disk and status == "RUNNING":
                self._fetch_events()
            if status.startswith(FINISHED):
                return self._finish(status)
            if self._is_decided():
                return 0

    def _is_decided(self) -> bool:
        """Wait for the next look at FLARE, or for the outcome."""
        until = time.monotonic() + _LOOK
        while time.monotonic() < until:
            if self.shares_disk and self.launch.outcome.exists():
                return True
            time.sleep(_GLANCE)
        return False

    def _fetch_events(self) -> None:
        try:
            answer = self.session.do_app_command(self.job_id, EVENTS, {"offset": self.offset})
        except Exception as error:  # noqa: BLE001 - FLARE says with many types that the job is about to begin or end
            sys.stdout.write(f"no events now: {type(error).__name__}: {error}\n")
            return
        with self.launch.events.open("a", encoding="utf-8") as file:
            file.write(str(answer.get("text", "")))
        self.offset = int(answer.get("offset", self.offset))

    def _finish(self, status: str) -> int:
        if not self.shares_disk:
            download(self.session, self.job_id, self.launch, offset=self.offset)
        if not self.launch.outcome.exists():
            sys.stdout.write(why_failed(self.session, self.job_id, status))
        return 0 if status == "FINISHED:COMPLETED" else 1


def submit(launch: Launch, kit: Path, job: Path, *, shares_disk: bool) -> int:
    """Submit ``job`` with an admin's kit and stay until it has ended.

    Args:
        launch: The run.
        kit: The admin's kit.
        job: The job's folder.
        shares_disk: Whether the server writes into the launch itself.
    """
    session = connect(kit, _START)
    try:
        return _submitted(session, launch, job, shares_disk=shares_disk)
    finally:
        session.close()


def carrying_job(launch: Launch, session: Session) -> Path:
    """Write the job that carries ``launch`` to the sites that it names, or to all that are connected.

    Raises:
        EngineError: If as many sites as the job was planned for do not connect in time.
    """
    settings = launch.read_settings()
    names = await_sites(session, list(settings["names"]), int(settings["num_clients"]))
    return write_carrying_job(launch.folder / "flare-job", settings["job"], launch, names)


def run(launch: Launch, kit: Path) -> int:
    """Submit a job that carries its launch, and stay until it has ended; its exit code."""
    session = connect(kit)
    try:
        return _submitted(session, launch, carrying_job(launch, session), shares_disk=False)
    finally:
        session.close()


def _submitted(session: Session, launch: Launch, job: Path, *, shares_disk: bool) -> int:
    signal.signal(signal.SIGTERM, _asked)
    job_id = ""
    try:
        job_id = session.submit_job(str(job))
        return Submission(session, launch, job_id, shares_disk).watch()
    except _Asked:
        if job_id:
            session.abort_job(job_id)
        return 1


def _asked(_number: int, _frame: FrameType | None) -> None:
    raise _Asked


if __name__ == "__main__":
    sys.exit(run(Launch(Path(sys.argv[1])), Path(sys.argv[2])))
