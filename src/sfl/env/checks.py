"""What every environment checks before it runs."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from sfl.errors import ConfigError, MissingExtraError

REMOTE = "remote.json"
"""In a run's folder: under which id a provisioned federation keeps the run."""


_EXTRAS = {"nvflare": "nvflare", "flwr": "flower", "ray": "flower"}


def require(*packages: str) -> None:
    """An engine's packages must be installed.

    Raises:
        MissingExtraError: Naming the command that installs the first that is not.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(package, _EXTRAS[package])


def check_counts(num_clients: int | None, num_threads: int | None) -> None:
    """Counts must make sense.

    Raises:
        ConfigError: Naming the one that does not.
    """
    for name, value, least in (("num_clients", num_clients, 1), ("num_threads", num_threads, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}.")


def refuse_provisioned(out: Path | None) -> None:
    """A run of a provisioned federation must go on there: its checkpoints, ledger and sites' memory are there.

    Raises:
        ConfigError: If ``out`` is the folder of such a run.
    """
    if out is not None and (out / REMOTE).is_file():
        backend = json.loads((out / REMOTE).read_text(encoding="utf-8")).get("backend", "nvflare-prod")
        raise ConfigError(
            f"backend must be {backend} to go on with {out}, which a federation of others keeps. "
            "Its checkpoints, its privacy ledger and what its sites remember are there."
        )
