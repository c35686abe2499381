"""What each command does. The applications, which load torch, are imported when they are run."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sfl.application.config import RunConfig
from sfl.cli.applications import APPLICATIONS, CONFIGS, ConfigFile, Entry, RunFolder, job_of_run, resolve_job
from sfl.cli.options import with_options
from sfl.errors import SflError
from sfl.utils.config import Resolved

Job = Annotated[Literal["esm2", "llm"], Parameter(help="Job whose options are shown.")]


def _runs(entry: Entry) -> Callable[..., int]:
    def body(*, config: ConfigFile = None, resume: RunFolder = None, **overrides: object) -> int:
        resolved = resolve_job(entry.name, config, resume, overrides)
        options: RunConfig = resolved.config
        try:
            return entry.load().run(resolved, _environment(options), resume=resume)
        except (SflError, OSError):
            if options.logging.verbose:
                sys.stderr.write(traceback.format_exc())
            raise
        except KeyboardInterrupt as interrupt:
            begun = interrupt.args[:1] or _resumable(resume, options.logging.out)
            raise KeyboardInterrupt(*begun) from None

    body.__doc__ = entry.summary
    return with_options((entry.config,), body)


def _environment(options: RunConfig) -> Any:
    from sfl.env import SimEnv, environment
    from sfl.server.robust.assembly import build_attack

    federation = options.federation
    if federation.backend == "sim":
        attack = build_attack(options.aggregation, federation.seed)
        return SimEnv(device=options.client.device, clock=options.simulation, attack=attack)
    return environment(
        federation.backend,
        device=options.client.device,
        startup_kit=federation.startup_kit,
        superlink=federation.superlink,
        root_certificates=federation.root_certificates,
    )


esm2 = _runs(APPLICATIONS["esm2"])
llm = _runs(APPLICATIONS["llm"])


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


def _show(job: Job | None = None, *, config: ConfigFile = None, resume: RunFolder = None, **overrides: object) -> int:
    """Show every option, its value, and where the value comes from."""
    named = job or (job_of_run(resume) if resume is not None else "esm2")
    _write_table(resolve_job(named, config, resume, overrides))
    return 0


show = with_options(CONFIGS, _show)


def warn(text: str) -> None:
    """Say something beside a command's output."""
    sys.stderr.write(f"{text}\n")


def _resumable(*folders: Path | str | None) -> list[str]:
    """The first of these folders that a run has begun to fill, if any."""
    return [str(folder) for folder in folders if folder and (Path(folder) / "config.yaml").is_file()][:1]


def _write_table(resolved: Resolved[Any]) -> None:
    heading = ("option", "value", "where from")
    rows = [heading, *((path, _text(value), source) for path, value, source in resolved.rows())]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    for option, value, source in rows:
        sys.stdout.write(f"{option:<{first}}  {value:<{second}}  {source}\n")


def _text(value: object) -> str:
    return "none" if value is None else repr(value) if value == "" else str(value)
