"""What one site remembers between rounds, kept so that a resumed run finds what it had before the round it repeats."""

from __future__ import annotations

import re
from pathlib import Path

from sfl.errors import CheckpointError
from sfl.io.tree import load_tree, save_tree
from sfl.types import StateTree

_NAME = re.compile(r"state-(\d{6})\.safetensors")
_KEEP = 3


class SiteStore:
    """A site's states on disk, one file for each round it took part in, the newest three kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, round: int, state: StateTree) -> None:
        """Keep the state after ``round``; states of this and later rounds, left by a crash, are replaced."""
        kept = self._rounds()
        for stale in [number for number in kept if number > round]:
            self._path(stale).unlink()
        earlier = [number for number in kept if number < round]
        save_tree(self._path(round), {"first": not earlier, "state": state})
        for old in earlier[: -(_KEEP - 1)]:
            self._path(old).unlink()

    def load(self, before: int) -> StateTree:
        """The state after the last round before ``before``, or ``None`` if the site had none.

        Raises:
            CheckpointError: If that state was there once and is no longer kept.
        """
        rounds = self._rounds()
        earlier = [number for number in rounds if number < before]
        if earlier:
            return load_tree(self._path(earlier[-1]))["state"]
        if before > 1 and rounds and not load_tree(self._path(rounds[0]))["first"]:
            raise CheckpointError(
                f"{self.folder} must hold the site's state before round {before}, got rounds {rounds}. "
                "The run fell back further than the sites remember; start it anew."
            )
        return None

    def _rounds(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def _path(self, round: int) -> Path:
        return self.folder / f"state-{round:06d}.safetensors"
