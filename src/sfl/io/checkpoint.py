"""Checkpoints of a run: one file a round, each a whole ``ServerState``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sfl.core.algorithm import ServerState
from sfl.errors import CheckpointError
from sfl.io.tree import load_tree, save_tree

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
        """Write the state atomically under its round's name."""
        path = self.folder / f"round-{state.round:06d}.safetensors"
        tree = {
            "round": state.round,
            "parameters": state.parameters,
            "algorithm": state.algorithm,
            "mechanisms": list(state.mechanisms),
        }
        save_tree(path, tree)
        if self.keep:
            for old in self.paths()[: -self.keep]:
                old.unlink()
        return path

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
                return _state(path, load_tree(path))
            except CheckpointError as error:
                warn(f"{error} Using the checkpoint before it.")
        if paths:
            raise CheckpointError(f"{self.folder} must hold a whole checkpoint, got {len(paths)} torn ones.")
        return None


def _state(path: Path, tree: object) -> ServerState:
    if not isinstance(tree, dict) or tree.keys() != {"round", "parameters", "algorithm", "mechanisms"}:
        raise CheckpointError(f"{path} must hold a server state, got another tree.")
    return ServerState(
        round=tree["round"],  # pyright: ignore[reportArgumentType]
        parameters=tree["parameters"],  # pyright: ignore[reportArgumentType]
        algorithm=tree["algorithm"],
        mechanisms=tree["mechanisms"],  # pyright: ignore[reportArgumentType]
    )
