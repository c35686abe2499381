"""The folder of one run: where each thing lies, and nothing outside it."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfl.errors import ConfigError, DataError
from sfl.io.tree import write_text


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside a run's folder.

    Attributes:
        path: The folder.
    """

    path: Path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """A new run's folder.

        Raises:
            ConfigError: If it holds something already, or cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(path.iterdir())
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"out must be a folder that can be made, got {str(path)!r}: {why}.") from error
        if occupied:
            raise ConfigError(
                f"out must be a new or empty folder, got {path}. Choose another, or go on with "
                f"--resume {shlex.quote(str(path))}."
            )
        return cls(path)

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder of a run that was begun.

        Raises:
            ConfigError: If it is not one.
        """
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"resume must be the folder of a run (with its config.yaml), got {path}.")
        return cls(path)

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that never began."""
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, one file a round."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The checkpoint of the best global model: another name of one in ``checkpoints``."""
        return self.path / "best.safetensors"

    @property
    def sites(self) -> Path:
        """What each simulated site remembers."""
        return self.path / "sites"

    @property
    def model(self) -> Path:
        """The final model."""
        return self.path / "model"

    @property
    def ledger(self) -> Path:
        """The privacy ledger."""
        return self.path / "ledger.jsonl"

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file atomically."""
        write_text(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read an object back; ``None`` if it is not there.

        Raises:
            DataError: If it is torn or something else.
        """
        file = self.path / name
        try:
            tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (OSError, ValueError) as error:
            raise DataError(f"{file} must be whole JSON, got: {error}. Put it back, or start a new run.") from error
        if not isinstance(tree, dict | None):
            raise DataError(f"{file} must hold a JSON object, got {tree!r:.60}. Put it back, or start a new run.")
        return tree

    def link_best(self, checkpoint: Path) -> None:
        """Let ``best`` name this checkpoint: by a hard link, or a copy where the file system has none."""
        if self.best.exists() and self.best.samefile(checkpoint):
            return
        partial = self.best.with_name(self.best.name + ".partial")
        partial.unlink(missing_ok=True)
        try:
            partial.hardlink_to(checkpoint)
        except OSError:
            shutil.copyfile(checkpoint, partial)
        partial.replace(self.best)

    def note_sites(self) -> None:
        """Write down which sites keep something; they are written before the checkpoint of their round."""
        known = self.known_sites()
        now = sorted({*known, *(path.parent.name for path in self.sites.glob("*/*"))})
        if now != known:
            self.write_json("sites.json", {"sites": now})

    def known_sites(self) -> list[str]:
        """The sites that kept something when the last checkpoint was written."""
        return list((self.read_json("sites.json") or {}).get("sites", ()))
