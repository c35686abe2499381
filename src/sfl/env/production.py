"""The environment of provisioned sites, and its parts for those who do not wait: submit now, bring home later."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from sfl.engine.launch import Launch
from sfl.env.carry import Cargo, carried_settings
from sfl.env.checks import require
from sfl.env.kept import add_note, kept_names, owned_run, read_note
from sfl.env.nvflare import flare_command
from sfl.env.remote import Plan, RemoteEnv, reason_of
from sfl.errors import ConfigError, EngineError
from sfl.recipe import Recipe

__all__ = ["ProdEnv", "bring_home", "check_kit", "export_job"]

_BACKEND = "nvflare-prod"
_MADE = "run"
"""Where a launch holds what the server has made of a run."""


@dataclass(frozen=True, kw_only=True)
class ProdEnv(RemoteEnv):
    """A provisioned FLARE federation that is up: the job is submitted with an admin's kit, as any FLARE job.

    The job carries what it needs; of the user's own code, the modules that it names, or its training script with what
    that imports from beside it. What the server makes stays on the server under the run's id until the job has ended,
    and is brought into ``out`` then; a run that was cut off goes on from there, for who has its key, which
    lies in ``out``.

    Attributes:
        startup_kit: Folder of the admin's kit.
        sites: Names of the sites that take part; by default all that are connected.
    """

    title: ClassVar[str] = "the job on its NVIDIA FLARE federation"

    startup_kit: Path
    sites: tuple[str, ...] = ()

    def command(self, launch: Launch) -> list[str]:
        """One process that submits the job and watches it."""
        return [*flare_command("submit", launch), str(self.startup_kit.absolute())]

    def settings(self, plan: Plan) -> dict[str, Any]:
        """What server and sites are told: nothing of this machine but the run's id."""
        check_kit(self.startup_kit)
        require("nvflare")
        names, run = sorted(self.sites) or kept_names(plan.out), owned_run(plan, _BACKEND)
        return {**carried_settings(plan.job, self.device), "names": names, "resume": plan.resume, "run": run}

    def write(self, plan: Plan, logs: Path) -> None:
        """Write what the job carries."""
        settings = {**self.settings(plan), "logs": str(logs)}
        Cargo.of(plan.recipe, plan.job).write(plan.launch, settings)

    def check_resumable(self, out: Path | None) -> None:
        """Such a run is kept by the federation itself."""

    def collect(self, launch: Launch, out: Path) -> None:
        """Copy what the server made into ``out``, and note which sites it was made with."""
        add_note(out, names=launch.read_settings()["names"])
        if (launch.folder / _MADE).is_dir():
            shutil.copytree(launch.folder / _MADE, out, dirs_exist_ok=True)

    def submit(self, recipe: Recipe, *, out: Path, resume: bool = False) -> str:
        """Submit a recipe and do not wait for it.

        Args:
            recipe: What to run.
            out: The run's folder, for ``bring_home`` once the job has ended.
            resume: Go on with the run in ``out`` from what the server kept of it.

        Returns:
            FLARE's name of the job.

        Raises:
            ConfigError: If ``out`` is to go on and is no run of such a federation, or its key is not there.
            EngineError: If the federation does not answer, does not fit the job, or refuses it, or if the run that is
                to go on is under way.
        """
        check_kit(self.startup_kit)
        require("nvflare")
        from sfl.engine.nvflare.admin import admin, is_under_way
        from sfl.engine.nvflare.submit import carrying_job

        job = recipe.build()
        with tempfile.TemporaryDirectory(prefix="sfl-submit-") as temporary:
            launch = Launch(Path(temporary))
            with admin(self.startup_kit) as session:
                before = str(read_note(out).get("job", ""))
                if resume and before and is_under_way(session, before):
                    raise EngineError(
                        f"the job of a run must have ended before the run goes on, got {before}, which has not. "
                        "Wait for it, or end it with: sfl abort"
                    )
                self.write(Plan(recipe, job, launch, out, resume), Path())
                name = session.submit_job(str(carrying_job(launch, session)))
            add_note(out, names=launch.read_settings()["names"], job=name)
        return name


def check_kit(kit: Path) -> None:
    """Whether a folder is an admin's kit.

    Raises:
        ConfigError: If it is not.
    """
    if not (kit / "startup" / "fed_admin.json").is_file():
        raise ConfigError(f"startup_kit must be the kit of an admin, got {str(kit)!r}.")


def bring_home(kit: Path, job: str, out: Path, *, wait: bool = False) -> str:
    """Bring what a submitted job has made into a folder, once it has ended.

    Args:
        kit: An admin's kit.
        job: FLARE's name of the job.
        out: A new folder, or that of the run, as ``ProdEnv.submit`` began it.
        wait: Whether to wait for a job that still runs.

    Returns:
        Why it ended before its last planned round; empty if it did not.

    Raises:
        ConfigError: If ``out`` holds something else.
        EngineError: If the job still runs, or left nothing.
        SflError: What the job itself raised; what it had made until then is in ``out``.
    """
    check_kit(kit)
    require("nvflare")
    from sfl.engine.nvflare.admin import admin, job_of, wait_for, why_failed
    from sfl.engine.nvflare.download import download

    with tempfile.TemporaryDirectory(prefix="sfl-download-") as temporary, admin(kit) as session:
        launch, line = Launch(Path(temporary)), wait_for(session, job) if wait else job_of(session, job)
        if not line.has_ended:
            raise EngineError(
                f"a job must have ended before it comes home, got {job} as {line.status}. "
                "Wait for it with --wait, or look again with: sfl status"
            )
        if not download(session, job, launch):
            raise EngineError(f"a job must have run to come home, got none. {why_failed(session, job, line.status)}")
        settings = launch.read_settings()
        _check_home(out, str(settings["run"]), job)
        out.mkdir(parents=True, exist_ok=True)
        add_note(out, backend=_BACKEND, run=settings["run"], names=settings["names"], job=job)
        if (launch.folder / _MADE).is_dir():
            shutil.copytree(launch.folder / _MADE, out, dirs_exist_ok=True)
        return reason_of(launch)


def export_job(
    recipe: Recipe, folder: Path, sites: tuple[str, ...], *, device: str = "auto", custom_code: bool = True
) -> Path:
    """Write a FLARE job that carries a recipe, for plain FLARE tools to submit.

    Args:
        recipe: What to run.
        folder: The job's folder; made anew.
        sites: The sites that it needs.
        device: Where sites compute: auto, cpu, mps, cuda or cuda:N.
        custom_code: Whether it is a job with custom code, by FLARE's rules, even if it brings none: federations whose
            policies do not name our components build them for such a job alone.

    Returns:
        The folder.

    Raises:
        ConfigError: If ``folder`` holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"output must be a new or empty folder, got {folder}. Choose another.")
    require("nvflare")
    from sfl.engine.nvflare.job import write_carrying_job

    job = recipe.build()
    with tempfile.TemporaryDirectory(prefix="sfl-export-") as temporary:
        launch = Launch(Path(temporary))
        cargo = Cargo.of(recipe, job)
        if custom_code and not cargo.code:
            note = launch.folder / "sfl.txt"
            note.write_text("This folder makes the job one with custom code: SFL's components are not FLARE's own.\n")
            cargo = replace(cargo, code={note.name: note})
        cargo.write(launch, carried_settings(job, device))
        return write_carrying_job(folder.absolute().parent, folder.name, launch, sites)


def _check_home(out: Path, run: str, job: str) -> None:
    note = read_note(out)
    if out.is_dir() and any(out.iterdir()) and note.get("run") != run:
        raise ConfigError(f"out must be a new folder or that of job {job}, got {out}. Choose another.")
