"""What a recipe of a training script means in terms of clients: the fields that replace its own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfl.client.script import ScriptClient
from sfl.errors import CompositionError
from sfl.train.model_source import ModelSource
from sfl.types import FederationConfig


@dataclass(frozen=True, kw_only=True)
class ScriptJob:
    """A training script and the federation that runs it. Plain data.

    Attributes:
        name: The job's name.
        path: The script.
        args: Its arguments, as one line or as a list.
        model: Where the initial parameters come from.
        params_format: ``"numpy"`` or ``"pytorch"``; ``None`` is tensors for a torch model, arrays otherwise.
        external: Whether it runs as a process of its own.
        command: What runs it then.
    """

    name: str
    path: str
    args: str | Sequence[str]
    model: ModelSource
    params_format: str | None
    external: bool
    command: str

    def fields(self, federation: FederationConfig) -> dict[str, Any]:
        """The fields of a recipe of clients that runs this."""
        chosen = self.params_format or ("pytorch" if self.model.is_torch else "numpy")
        script = {
            "path": str(Path(self.path).absolute()),
            "args": shlex.split(self.args) if isinstance(self.args, str) else [str(word) for word in self.args],
            "params_format": chosen,
            "rounds": federation.num_rounds,
            "job": self.name,
            "external": self.external,
            "command": self.command,
        }
        source = self.model
        plain = source.arrays if source.arrays and not source.checkpoint else source
        return {
            "client": ScriptClient,
            "client_kwargs": {"script": script},
            "initial_parameters": dict(plain) if isinstance(plain, dict) else plain,
            "federation": federation,
        }


def sized(federation: FederationConfig, min_clients: int | None, num_rounds: int | None) -> FederationConfig:
    """The federation with at least ``min_clients`` sites, all of which a round needs, and ``num_rounds`` rounds.

    Raises:
        CompositionError: If either is less than 1.
    """
    for name, value in (("min_clients", min_clients), ("num_rounds", num_rounds)):
        if value is not None and value < 1:
            raise CompositionError(f"{name} must be at least 1, got {value}.")
    if min_clients is not None:
        said = federation.num_clients if federation != FederationConfig() else 0
        needed = max(min_clients, federation.min_available_clients)
        federation = replace(federation, num_clients=max(min_clients, said), min_available_clients=needed)
    return federation if num_rounds is None else replace(federation, num_rounds=num_rounds)
