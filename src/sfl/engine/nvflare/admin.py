"""An admin's session with a federation: whom its kit is for, who is connected, which jobs there are."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api import api_spec
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session
from nvflare.fuel.utils.config_service import ConfigService

from sfl.errors import EngineError, SflError

CONNECT = 15.0
"""Seconds that a server which is up gets to answer."""
SITES = 20.0
"""Seconds that sites get to connect to a server that is up."""
_LOOK = 1.0  # seconds between two looks at what is waited for
_LOST = 20.0  # seconds after which a job that runs nowhere does not begin or end, but is lost
FINISHED = "FINISHED"
"""How FLARE's names of all states begin that a job does not leave."""


@dataclass(frozen=True, kw_only=True)
class JobLine:
    """One job of a federation.

    Attributes:
        id: FLARE's name of it.
        name: Its own name.
        status: FLARE's word: SUBMITTED, DISPATCHED, RUNNING, FINISHED:COMPLETED …
        submitter: The admin who submitted it.
        submitted: When, as ISO 8601.
        duration: How long it has run.
    """

    id: str
    name: str
    status: str
    submitter: str = ""
    submitted: str = ""
    duration: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status.startswith(FINISHED)


@dataclass(frozen=True, kw_only=True)
class FederationState:
    """A federation as its server sees it.

    Attributes:
        server: `up`: it has answered.
        sites: Names of the sites that are connected, sorted.
        jobs: Its jobs, the newest last.
    """

    server: str
    sites: tuple[str, ...]
    jobs: tuple[JobLine, ...]


def connect(kit: Path, seconds: float | None = None) -> Session:
    """A session of the admin that a kit is for.

    Args:
        kit: The kit.
        seconds: How long its server may take to answer; ``CONNECT`` by default.

    Raises:
        EngineError: If the server does not answer, or does not know the admin.
    """
    try:
        config = json.loads((kit / "startup" / "fed_admin.json").read_text(encoding="utf-8"))
        user = str(config.get("admin", {}).get("username") or kit.name)
        # where FLARE looks for settings of its transport; else it reads every folder below the current one, eight times
        ConfigService.initialize({}, [str(kit / "startup")])
        return new_secure_session(user, str(kit), timeout=CONNECT if seconds is None else seconds)
    except Exception as error:  # FLARE raises many types, most of them bare
        raise EngineError(
            f"the kit {kit} must open a session with its server, got {type(error).__name__}: {error}. "
            "Is the server up, and are kit and server of one provisioning?"
        ) from error


@contextmanager
def admin(kit: Path, seconds: float | None = None) -> Generator[Session]:
    """A session inside a command of ours: FLARE says nothing, and its errors are ours.

    Args:
        kit: The admin's kit.
        seconds: How long its server may take to answer; ``CONNECT`` by default.

    Raises:
        EngineError: Whatever FLARE refuses, with its own words.
    """
    flare, said = logging.getLogger("nvflare"), io.StringIO()
    before = flare.handlers, flare.propagate
    flare.handlers, flare.propagate = [logging.NullHandler()], False
    try:
        with contextlib.redirect_stdout(said):
            session = connect(kit.absolute(), seconds)
        try:
            yield session
        except (SflError, OSError):
            raise
        except Exception as error:  # FLARE raises many types, most of them bare
            raise EngineError(_explained(error)) from error
        finally:
            with contextlib.redirect_stdout(said):
                session.close()
    finally:
        flare.handlers, flare.propagate = before


def look(session: Session, job: str = "") -> FederationState:
    """How a federation is.

    Args:
        session: An admin's.
        job: Show this job alone.

    Raises:
        EngineError: If there is no such job.
    """
    system = session.get_system_info()
    metas = [_meta(session, job)] if job else list(session.list_jobs(detailed=True))
    return FederationState(
        server="up",
        sites=tuple(sorted(str(client.name) for client in system.client_info)),
        jobs=tuple(sorted((_line(meta) for meta in metas), key=lambda line: line.submitted)),
    )


def await_sites(session: Session, names: Sequence[str], planned: int, seconds: float = SITES) -> list[str]:
    """Wait until the sites of a job are connected, as those of a federation that is just being started are not yet.

    Args:
        session: An admin's.
        names: The sites; all that are connected, if it is empty.
        planned: For how many the job was planned: a site's share of the work depends on its place among all.
        seconds: How long they have.

    Returns:
        Their names: as they were given, else sorted.

    Raises:
        EngineError: If there are more, or not as many in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        there = sorted(str(client.name) for client in session.get_connected_client_list())
        found = [name for name in names if name in there] if names else there
        unfit = len(names) not in (0, planned) or len(found) > planned
        if len(found) == planned and not unfit:
            return found
        if unfit or time.monotonic() >= deadline:
            raise EngineError(
                f"as many sites must be connected as num_clients={planned}, got {len(found)}: {', '.join(found)}. "
                "Start the missing ones, set --num-clients, or name the sites."
            )
        time.sleep(_LOOK)


def job_of(session: Session, job: str) -> JobLine:
    """One job.

    Raises:
        EngineError: If there is no such job.
    """
    return _line(_meta(session, job))


def is_under_way(session: Session, job: str) -> bool:
    """Whether a job waits or runs; one that the server lost when it was restarted does not.

    Raises:
        EngineError: If there is no such job.
    """
    line = job_of(session, job)
    running = {str(info.job_id) for info in session.get_system_info().job_info}
    return not line.has_ended and (line.status != "RUNNING" or job in running)


def wait_for(session: Session, job: str) -> JobLine:
    """Stay until a job has ended.

    Raises:
        EngineError: If the server has lost it.
    """
    seen = time.monotonic()
    while not (line := job_of(session, job)).has_ended:
        running = {str(info.job_id) for info in session.get_system_info().job_info}
        if line.status != "RUNNING" or job in running:
            seen = time.monotonic()
        elif time.monotonic() - seen > _LOST:
            raise EngineError(_lost(job))
        time.sleep(_LOOK)
    return line


def end(session: Session, job: str) -> JobLine:
    """End a job that waits or runs, and stay until it has ended.

    Raises:
        EngineError: If there is no such job, it does not end, or the server has lost it.
    """
    line = job_of(session, job)
    if line.has_ended:
        return line
    try:
        session.abort_job(job)
    except api_spec.InternalError as error:  # FLARE's word for a job that is not running any more
        line = job_of(session, job)
        if line.has_ended:
            return line
        raise EngineError(_lost(job)) from error
    return wait_for(session, job)


def _lost(job: str) -> str:
    return (
        f"a job that is called RUNNING must run, got {job}, which its server lost when it was restarted. "
        "Go on with its run: sfl run JOB --resume"
    )


def why_failed(session: Session, job: str, status: str) -> str:
    """What FLARE knows of a job that ended without our outcome."""
    details = [str(line) for line in session.get_job_meta(job).get("job_deploy_detail") or ()]
    try:
        logs = session.get_job_logs(job, target="server").get("logs", {})
        ends = [f"{site}:\n" + "\n".join(str(text).splitlines()[-15:]) for site, text in dict(logs).items()]
    except api_spec.AuthorizationError:
        ends = ["The server's log is not for this admin's role."]
    return "\n".join([f"FLARE ended job {job} as {status}", *details, *ends]) + "\n"


def _meta(session: Session, job: str) -> dict[str, Any]:
    try:
        return dict(session.get_job_meta(job))
    except (api_spec.JobNotFound, api_spec.InternalError) as error:
        raise EngineError(
            f"a job must be one that the server knows, got {job!r}: {error}. List them: sfl status --startup-kit KIT"
        ) from error


def _line(meta: dict[str, Any]) -> JobLine:
    def said(key: str) -> str:
        return str(meta.get(key) or "")

    submitted = said("submit_time_iso").partition(".")[0]
    return JobLine(
        id=said("job_id"),
        name=said("name") or said("job_name"),
        status=said("status"),
        submitter=said("submitter_name"),
        submitted=submitted,
        duration="" if said("duration") == "N/A" else said("duration").partition(".")[0],
    )


def _explained(error: Exception) -> str:
    """What must be, what FLARE said, what to do."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, api_spec.AuthorizationError):
        return f"this admin must have the right to do that, got: {said}. Use the kit of one who has."
    if isinstance(error, api_spec.NoConnection | api_spec.SessionClosed):
        return f"the server must stay reachable, got: {said}. Is it up?"
    return f"FLARE must do what was asked, got {type(error).__name__}: {said}"
