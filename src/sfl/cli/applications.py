"""The applications by name, and how their options are found. What runs them, which loads torch, is imported late."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from cyclopts import Parameter

from sfl.application.config import RESUMABLE, RunConfig
from sfl.errors import ConfigError, DataError
from sfl.esm2.config import ESM2RunConfig
from sfl.llm.config import LLMRunConfig
from sfl.utils.config import Resolved, options_of, resolve

if TYPE_CHECKING:
    from sfl.application.job import Application

__all__ = ["APPLICATIONS", "CONFIGS", "ConfigFile", "Entry", "JobName", "RunFolder", "job_of_run", "resolve_job"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An application as the command line knows it.

    Attributes:
        name: Its name.
        config: Its options.
        summary: What it does, in a line.
    """

    name: str
    config: type[RunConfig]
    summary: str

    def load(self) -> Application[Any]:
        """The application itself."""
        return import_module(f"sfl.{self.name}.main").APPLICATION


APPLICATIONS: Final = {
    entry.name: entry
    for entry in (
        Entry(name="esm2", config=ESM2RunConfig, summary="Train ESM2, a protein language model, on several sites."),
        Entry(name="llm", config=LLMRunConfig, summary="Fine-tune a causal language model on several sites."),
    )
}
CONFIGS: Final = tuple(entry.config for entry in APPLICATIONS.values())

JobName = Annotated[Literal["esm2", "llm"], Parameter(name="--job", help="Whose options these are.")]
ConfigFile = Annotated[
    Path | None,
    Parameter(
        name="--config",
        help="YAML file with sections federation, client, privacy, aggregation and logging. Without it, "
        "config/default.yaml and then config/<job>.yaml are read where they exist in the current folder. Environment "
        "variables SFL_<OPTION> win over files, and flags win over both.",
    ),
]
RunFolder = Annotated[
    Path | None,
    Parameter(
        name="--resume",
        help="Folder of a run to go on with. Its config.yaml is read instead of files and environment, and only "
        f"{', '.join(RESUMABLE)} may be given anew.",
    ),
]


def resolve_job(job: str, config: Path | None, run: Path | None, overrides: Mapping[str, object]) -> Resolved[Any]:
    """The options of a run: of a new one, or of the one that it goes on with.

    Args:
        job: The application's name.
        config: A YAML file to read instead of those of the current folder.
        run: The folder of the run to go on with.
        overrides: The flags that were given.

    Raises:
        ConfigError: If an option is wrong, not this job's, or may not change.
    """
    kind = APPLICATIONS[job].config
    _require_own(job, overrides)
    if run is None:
        files = [config] if config else [file for file in _default_files(job) if file.is_file()]
        return resolve(kind, yaml_files=files, environ=os.environ, overrides=overrides)
    refused = [name for name in overrides if name not in RESUMABLE] + (["config"] if config else [])
    if refused:
        flags = ", ".join("--" + name.replace("_", "-") for name in refused)
        raise ConfigError(
            f"What changes at --resume must be one of {', '.join(RESUMABLE)}, got {flags}. "
            "Remove it, or start a new run without --resume."
        )
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"--resume must name the folder of a run, with its config.yaml, got {str(run)!r}.")
    began = job_of_run(run)
    if began != job:
        raise ConfigError(f"--resume must name the folder of a run of {job}, got one of {began}: {str(run)!r}.")
    return resolve(kind, yaml_files=[file], environ={}, overrides=overrides)


def job_of_run(run: Path) -> str:
    """Which application's run lies in a folder.

    Raises:
        ConfigError: If it says one that is not there.
    """
    from sfl.application.kept import job_of
    from sfl.io import run_folder

    try:
        job = job_of(run_folder.RunFolder(run))
    except DataError as error:
        raise ConfigError(str(error)) from error
    if job not in APPLICATIONS:
        raise ConfigError(f"{run} must hold a run of {' or '.join(APPLICATIONS)}, got {job!r}.")
    return job


def _require_own(job: str, overrides: Mapping[str, object]) -> None:
    own = options_of(APPLICATIONS[job].config)
    for name in overrides:
        if name not in own:
            whose = [entry.name for entry in APPLICATIONS.values() if name in options_of(entry.config)]
            raise ConfigError(
                f"--{name.replace('_', '-')} must come with the job {' or '.join(whose)}, got {job}. Leave it out."
            )


def _default_files(job: str) -> tuple[Path, Path]:
    return Path("config/default.yaml"), Path(f"config/{job}.yaml")
