"""Runs that a federation of others keeps: what a run's folder here notes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfl.env.checks import REMOTE
from sfl.env.remote import Plan
from sfl.errors import ConfigError
from sfl.io.tree import write_secret, write_text

__all__ = ["add_note", "kept_names", "owned_run", "read_note"]


def read_note(out: Path) -> Mapping[str, Any]:
    """What the folder of a run notes: ``run``, ``backend``, later ``names`` and ``job``; empty if it notes nothing."""
    file = out / REMOTE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def add_note(out: Path, **more: Any) -> None:
    """Add to it."""
    write_text(out / REMOTE, json.dumps({**read_note(out), **more}) + "\n")


def kept_names(out: Path | None) -> list[str]:
    """The sites that a run in ``out`` was begun with, if it says so: their order is part of the run."""
    return list(read_note(out or Path()).get("names", ()))


def owned_run(plan: Plan, backend: str) -> str:
    """The id under which server and sites keep a run, after handing its owner's key to the launch and to ``out``.

    A new run has a new key; one that goes on has that of the run in ``out``.

    Args:
        plan: The run.
        backend: Who keeps it.

    Raises:
        ConfigError: If ``out`` is to go on and is no run of this backend, or its key is not there.
    """
    from sfl.engine.owner import KEY, new_key, run_of

    out = plan.out or Path()
    key = new_key()
    if plan.resume:
        known = read_note(out)
        if known.get("backend") != backend:
            raise ConfigError(f"out must be the folder of a run that {backend} keeps, got {str(plan.out)!r}.")
        kept = (out / KEY).read_bytes() if (out / KEY).is_file() else b""
        key = kept if len(kept) == len(key) else key
        if run_of(key) != known["run"]:
            raise ConfigError(f"out must hold the key of its run, {KEY}, got none or another in {out}. Put it back.")
    elif plan.out is not None:
        write_secret(out / KEY, key)
        write_text(out / REMOTE, json.dumps({"run": run_of(key), "backend": backend}) + "\n")
    write_secret(plan.launch.folder / KEY, key)
    return run_of(key)
