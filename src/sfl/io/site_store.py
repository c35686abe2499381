"""What one site remembers between rounds, kept so that a resumed run finds what it had before the round it repeats."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sfl.errors import CheckpointError
from sfl.io.tree import load_tree, save_tree, write_secret, write_text
from sfl.types import StateTree

_NAME = re.compile(r"state-(\d{6})\.safetensors")
_KEEP = 3


class SecretStore:
    """One secret of a site, in a file that its user alone can read; what is replaced is gone.

    Args:
        folder: Of the site; ``None`` keeps the secret in this process.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / "secret.safetensors" if folder is not None else None
        self._kept: StateTree = None

    def load(self) -> StateTree:
        """What was kept last; ``None`` if nothing was.

        Raises:
            CheckpointError: If the file is torn or was edited.
        """
        if self._path is None or not self._path.exists():
            return self._kept
        return load_tree(self._path)

    def save(self, tree: StateTree) -> None:
        """Keep this in its place, atomically."""
        if self._path is None:
            self._kept = tree
            return
        save_tree(self._path, tree, secret=True)

    def common(self, name: str, make: Callable[[], bytes]) -> bytes:
        """What all simulated sites have in common, beside their folders; made by whichever asks first.

        Without folders it lies in this process alone.
        """
        if self._path is None:
            return _COMMON.get(name) or _COMMON.setdefault(name, make())
        path = self._path.parent.parent / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            mine = path.with_name(f".{name}-{secrets.token_hex(8)}")
            write_secret(mine, make())
            with suppress(FileExistsError):  # another site was first
                path.hardlink_to(mine)
            mine.unlink()
        return path.read_bytes()

    def seen(self, name: str) -> bytes | None:
        """The same, if any site has asked for it."""
        if self._path is None:
            return _COMMON.get(name)
        path = self._path.parent.parent / name
        return path.read_bytes() if path.exists() else None


_COMMON: dict[str, bytes] = {}


class SiteStore:
    """A site's states on disk, one file for each round it took part in, the newest three kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._life = folder / "life.json"  # beside the states, whose bytes are the same in every run

    def save(self, round: int, state: StateTree, life: str = "") -> None:
        """Keep the state after a task of ``round``; states of this and later rounds are replaced.

        Args:
            round: The task's round.
            state: What the site remembers.
            life: Which life of the server sent the task.
        """
        kept = self._rounds()
        for stale in [number for number in kept if number > round]:
            self._path(stale).unlink()
        earlier = [number for number in kept if number < round]
        save_tree(self._path(round), {"first": not earlier, "state": state})
        write_text(self._life, json.dumps({"round": round, "life": life}) + "\n")
        for old in earlier[: -(_KEEP - 1)]:
            self._path(old).unlink()

    def load(self, before: int, life: str = "") -> StateTree:
        """The state after the last round before ``before``, or ``None`` if the site had none.

        Within one life of the server that is the newest state: a workflow may give a site two tasks in a round. A
        server that has come back repeats the round it was in, so what an earlier life left of it does not count.

        Raises:
            CheckpointError: If that state was there once and is no longer kept.
        """
        rounds = self._rounds()
        if life and rounds and self._is_of(rounds[-1], life):
            return load_tree(self._path(rounds[-1]))["state"]
        earlier = [number for number in rounds if number < before]
        if earlier:
            return load_tree(self._path(earlier[-1]))["state"]
        if before > 1 and rounds and not load_tree(self._path(rounds[0]))["first"]:
            raise CheckpointError(
                f"{self.folder} must hold the site's state before round {before}, got rounds {rounds}. "
                "The run fell back further than the sites remember; start it anew."
            )
        return None

    def _is_of(self, round: int, life: str) -> bool:
        """Whether the state of ``round`` was left by this life of the server."""
        try:
            return json.loads(self._life.read_text(encoding="utf-8")) == {"round": round, "life": life}
        except (OSError, ValueError):
            return False  # not known: the state before the round is the safe one

    def _rounds(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def _path(self, round: int) -> Path:
        return self.folder / f"state-{round:06d}.safetensors"
