"""What each command does. The applications, which load torch, are imported when they are run."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from sfl.cli.options import with_options
from sfl.errors import ConfigError, SflError
from sfl.esm2.config import RESUMABLE, ESM2RunConfig
from sfl.utils.config import Resolved, resolve

Job = Annotated[Literal["esm2"], Parameter(help="Job whose options are shown.")]
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


def _esm2(*, config: ConfigFile = None, resume: RunFolder = None, **overrides: object) -> int:
    """Train ESM2, a protein language model, on several sites."""
    resolved = resolve_esm2(config, resume, overrides)
    from sfl.env import SimEnv, environment
    from sfl.esm2.main import run_esm2
    from sfl.server.robust.assembly import build_attack

    options = resolved.config
    try:
        federation = options.federation
        if federation.backend == "sim":
            attack = build_attack(options.aggregation, federation.seed)
            env = SimEnv(device=options.client.device, clock=options.simulation, attack=attack)
        else:
            env = environment(
                federation.backend,
                device=options.client.device,
                startup_kit=federation.startup_kit,
                superlink=federation.superlink,
                root_certificates=federation.root_certificates,
            )
        return run_esm2(resolved, env, resume=resume)
    except (SflError, OSError):
        if options.logging.verbose:
            sys.stderr.write(traceback.format_exc())
        raise
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(*(interrupt.args or _resumable(resume, options.logging.out))) from None


def sum_demo(*, num_clients: int = 2, num_rounds: int = 3, base_secret: float = 7.0) -> int:
    """Add up one number per site: the smallest federated job.

    Args:
        num_clients: Number of sites in the federation.
        num_rounds: Number of federated rounds.
        base_secret: A site's secret is this plus the site's number.
    """
    from sfl.server.app import run_sum

    run_sum(num_clients=num_clients, num_rounds=num_rounds, base_secret=base_secret)
    return 0


def _show(job: Job = "esm2", *, config: ConfigFile = None, resume: RunFolder = None, **overrides: object) -> int:
    """Show every option, its value, and where the value comes from."""
    del job
    _write_table(resolve_esm2(config, resume, overrides))
    return 0


esm2 = with_options(ESM2RunConfig, _esm2)
show = with_options(ESM2RunConfig, _show)


def resolve_esm2(config: Path | None, run: Path | None, overrides: Mapping[str, object]) -> Resolved[ESM2RunConfig]:
    """The options of a run of ESM2: of a new one, or of the one that it goes on with.

    Args:
        config: A YAML file to read instead of those of the current folder.
        run: The folder of the run to go on with.
        overrides: The flags that were given.

    Raises:
        ConfigError: If an option is wrong, or may not change.
    """
    if run is None:
        files = [config] if config else [file for file in _default_files("esm2") if file.is_file()]
        return resolve(ESM2RunConfig, yaml_files=files, environ=os.environ, overrides=overrides)
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
    return resolve(ESM2RunConfig, yaml_files=[file], environ={}, overrides=overrides)


def warn(text: str) -> None:
    """Say something beside a command's output."""
    sys.stderr.write(f"{text}\n")


def _resumable(*folders: Path | str | None) -> list[str]:
    """The first of these folders that a run has begun to fill, if any."""
    return [str(folder) for folder in folders if folder and (Path(folder) / "config.yaml").is_file()][:1]


def _default_files(job: str) -> tuple[Path, Path]:
    return Path("config/default.yaml"), Path(f"config/{job}.yaml")


def _write_table(resolved: Resolved[ESM2RunConfig]) -> None:
    heading = ("option", "value", "where from")
    rows = [heading, *((path, _text(value), source) for path, value, source in resolved.rows())]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    for option, value, source in rows:
        sys.stdout.write(f"{option:<{first}}  {value:<{second}}  {source}\n")


def _text(value: object) -> str:
    return "none" if value is None else repr(value) if value == "" else str(value)
