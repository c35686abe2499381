"""The folder of one run: where each thing lies, and nothing outside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfl.errors import ConfigError
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
        except OSError as error:
            raise ConfigError(f"out must be a folder that can be made, got {path}: {error.strerror}.") from error
        if occupied:
            raise ConfigError(
                f"out must be a new or empty folder, got {path}. Choose another, or go on with --resume {path}."
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

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, one file a round."""
        return self.path / "checkpoints"

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

    def read_json(self, name: str) -> Any:
        """Read one back; ``None`` if it is not there."""
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
