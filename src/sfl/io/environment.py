"""What a run ran on: versions, machine, commit and command line. Never a secret."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

__all__ = ["environment"]

_PACKAGES = (
    "sfl", "numpy", "torch", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "PyYAML", "rich",
    "cyclopts", "plotly", "jinja2", "tensorboard", "flwr", "ray", "nvflare", "opacus", "dp-accounting", "tenseal",
)  # fmt: skip
_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")
_PREFIX = "SFL_"
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_SECRET_OPTION = re.compile(r"(^|[-_.])(api)?(keys?|tokens?|secrets?|password|passwd|credentials?)$", re.IGNORECASE)
_LOGIN = re.compile(r"(://)[^/@\s]+@")
_MASK = "***"


def environment() -> dict[str, Any]:
    """Facts for ``environment.json``: all values are JSON.

    Of the environment variables only a short list is read; whatever is named like a key, token, secret or password is
    masked there and on the command line.

    Returns:
        ``started`` (UTC, ISO 8601), ``python``, ``platform``, ``machine``, ``cpus``, ``packages`` (name to version,
        those installed), ``git`` (``commit`` and ``dirty`` of the working directory's repository, or None),
        ``command``, ``variables``.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": _versions(),
        "git": _git(),
        "command": _command(list(sys.argv)),
        "variables": _variables(dict(os.environ)),
    }


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git() -> dict[str, Any] | None:
    commit = _ask_git("rev-parse", "HEAD")
    if not commit:
        return None
    changes = _ask_git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _ask_git(*arguments: str) -> str | None:
    """What git says, or None where there is no git, no repository or no answer. It takes no lock and writes nothing."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _variables(variables: dict[str, str]) -> dict[str, str]:
    chosen = {name: value for name, value in variables.items() if name in _VARIABLES or name.startswith(_PREFIX)}
    return {
        name: _MASK if any(word in name.upper() for word in _SECRET) else _LOGIN.sub(rf"\1{_MASK}@", value)
        for name, value in sorted(chosen.items())
    }


def _command(arguments: list[str]) -> list[str]:
    """The command line with the values of options such as ``--hub.token`` masked, and logins in addresses."""
    masked: list[str] = []
    secret_next = False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        is_secret = bool(_SECRET_OPTION.search(option))
        if secret_next and not argument.startswith("-"):
            masked.append(_MASK)
        elif is_secret and equals:
            masked.append(f"{option}={_MASK}")
        else:
            masked.append(_LOGIN.sub(rf"\1{_MASK}@", argument))
        secret_next = is_secret and not equals and argument.startswith("-")
    return masked
