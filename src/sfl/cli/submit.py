"""Submitting a job to a federation that is up, without waiting for it."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sfl.cli.applications import APPLICATIONS, ConfigFile, Entry, RunFolder, resolve_job
from sfl.cli.commands import warn
from sfl.cli.options import with_options
from sfl.errors import ConfigError

BACKEND = "nvflare-prod"


def _submits(entry: Entry) -> Callable[..., int]:
    def body(*, config: ConfigFile = None, resume: RunFolder = None, **overrides: object) -> int:
        return submit_job(entry, config, overrides, resume)

    body.__doc__ = f"{entry.summary[:-1]}: submit it, and do not wait for it."
    return with_options((entry.config,), body)


esm2 = _submits(APPLICATIONS["esm2"])
llm = _submits(APPLICATIONS["llm"])


def submit_job(entry: Entry, config: Path | None, overrides: Mapping[str, object], resume: Path | None) -> int:
    """Submit an application's job with the kit that the options name.

    Args:
        entry: The application.
        config: A YAML file to read instead of those of the current folder.
        overrides: The flags that were given.
        resume: The folder of the run to go on with.

    Raises:
        ConfigError: If an option is wrong, or there is no kit.
        EngineError: If the federation does not take the job.
    """
    if overrides.get("backend", BACKEND) != BACKEND:
        raise ConfigError(f"backend must be {BACKEND} to submit, got {overrides['backend']!r}. Leave it out.")
    resolved = resolve_job(entry.name, config, resume, {**overrides, "backend": BACKEND})
    kit = _kit(resolved.config.federation.startup_kit)
    from sfl.env import ProdEnv

    recipe, folder, write_config = entry.load().begin(resolved, warn, resume=resume)
    env = ProdEnv(device=resolved.config.client.device, startup_kit=kit)
    try:
        job = env.submit(recipe, out=folder, resume=resume is not None)
    except BaseException:
        if resume is None:
            shutil.rmtree(folder)  # it holds no more than what was said; the next try may have its name
        raise
    write_config()
    return said(job, kit, folder)


def sum_demo(
    *,
    num_clients: int = 2,
    num_rounds: int = 3,
    base_secret: float = 7.0,
    startup_kit: Path | None = None,
    out: Path | None = None,
) -> int:
    """Submit the smallest federated job: one number per site is added up.

    Args:
        num_clients: Number of sites in the federation.
        num_rounds: Number of federated rounds.
        base_secret: A site's secret is this plus the site's number.
        startup_kit: Folder of an admin's kit.
        out: Folder of the run; by default runs/sum-<time>.
    """
    kit = _kit(startup_kit)
    from sfl.env import ProdEnv
    from sfl.server.app import sum_recipe

    folder = out or Path(f"runs/sum-{time.strftime('%Y%m%d-%H%M%S')}")
    recipe = sum_recipe(num_clients=num_clients, num_rounds=num_rounds, base_secret=base_secret)
    return said(ProdEnv(startup_kit=kit).submit(recipe, out=folder), kit, folder)


def said(job: str, kit: Path, out: Path) -> int:
    """Say the job's id, alone on standard output, and beside it what can be done now."""
    sys.stdout.write(f"{job}\n")
    sys.stderr.write(f"submitted; bring it home, when it has ended, with:\n  {download_command(job, kit, out)}\n")
    return 0


def download_command(job: str, kit: Path, out: Path) -> str:
    """The command that brings a job home."""
    return shlex.join(["sfl", "download", job, "--wait", "--startup-kit", str(kit), "--out", str(out)])


def _kit(given: str | Path | None) -> Path:
    if given is None:
        raise ConfigError("startup_kit must be the folder of an admin's kit, got none. Give --startup-kit.")
    return Path(given)
