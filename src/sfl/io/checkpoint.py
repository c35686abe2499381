"""Checkpoints of a run: one file a round, each a whole ``ServerState``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from sfl.core.algorithm import ServerState
from sfl.errors import CheckpointError
from sfl.io.tree import load_tree, save_tree
from sfl.types import StateTree

_FIELDS = {field.name for field in fields(ServerState)}
_WITHIN = {"round", "parameters", "algorithm", "mechanisms"}  # what the first checkpoints had
_NAME = re.compile(r"round-(\d{6})\.safetensors")


class Checkpoints:
    """The folder of a run's checkpoints.

    Args:
        folder: Made when the first checkpoint is written.
        keep: How many of the newest to keep; 0 keeps all.
    """

    def __init__(self, folder: Path, *, keep: int = 0) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: ServerState) -> Path:
        """Write the state atomically under its round's name; of the old ones, keep the newest and the best model's."""
        path = self.path(state.round)
        save_state(path, state)
        best = self.path(state.best["round"]) if isinstance(state.best, dict) else None
        if self.keep:
            for old in self.paths()[: -self.keep]:
                if old != best:
                    old.unlink()
        return path

    def path(self, round: object) -> Path:
        """Where the checkpoint of a round lies, if it is kept."""
        return self.folder / f"round-{round:06d}.safetensors"

    def paths(self) -> list[Path]:
        """All checkpoint files, oldest round first. Partial files do not count."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def load_latest(self, warn: Callable[[str], None]) -> ServerState | None:
        """The newest whole checkpoint, or ``None`` where there is none yet.

        A torn or edited one is said through ``warn`` and the one before it is used.

        Raises:
            CheckpointError: If there are checkpoints and not one of them is whole.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return load_state(path)
            except CheckpointError as error:
                warn(f"{error} Using the checkpoint before it.")
        if paths:
            raise CheckpointError(f"{self.folder} must hold a whole checkpoint, got {len(paths)} torn ones.")
        return None


def save_state(path: Path, state: ServerState) -> None:
    """Write one state atomically."""
    tree: dict[str, StateTree] = {field.name: getattr(state, field.name) for field in fields(ServerState)}
    save_tree(path, tree)


def load_state(path: Path) -> ServerState:
    """Read one state back.

    Raises:
        CheckpointError: If the file is missing, torn, edited, or holds something else.
    """
    tree = load_tree(path)
    if not isinstance(tree, dict) or not _WITHIN <= tree.keys() <= _FIELDS:
        raise CheckpointError(f"{path} must hold a server state, got another tree.")
    read: dict[str, Any] = tree
    return ServerState(**read)
