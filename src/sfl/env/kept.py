"""Runs that a federation of others keeps: what a run's folder here notes of them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfl.env.checks import REMOTE
from sfl.errors import ConfigError
from sfl.io.tree import write_text

__all__ = ["add_note", "kept_names", "read_note", "run_id"]


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


def run_id(out: Path | None, backend: str, *, resume: bool, new: str = "") -> str:
    """The id under which server and sites keep this run: a new one, or that of the run in ``out``.

    Args:
        out: The run's folder, if it has one.
        backend: Who keeps it.
        resume: Whether the run in ``out`` goes on.
        new: The id of a new run; by default a random one.

    Raises:
        ConfigError: If ``out`` is to go on and is no run of this backend.
    """
    if resume:
        known = read_note(out or Path())
        if known.get("backend") != backend:
            raise ConfigError(f"out must be the folder of a run that {backend} keeps, got {str(out)!r}.")
        return str(known["run"])
    run = new or uuid.uuid4().hex
    if out is not None:
        write_text(out / REMOTE, json.dumps({"run": run, "backend": backend}) + "\n")
    return run
