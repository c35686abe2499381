"""A run's events as lines of a file, written in the server's process and read in the user's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from sfl.core.events import Event
from sfl.utils.plain import describe, restore

_ALLOWED = ("sfl.core.events:", "sfl.core.task:Status")


class EventWriter:
    """An observer that appends every event to a file, flushed, so that a reader sees it at once."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self._file.write(json.dumps(describe(event, "event")) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class EventReader:
    """Reads what has been written since the last look. Half a line waits for its other half."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._rest = b""

    def new(self) -> Iterator[Event]:
        """Events that have come since the last call."""
        if self._file is None:
            if not self._path.exists():
                return
            self._file = self._path.open("rb")
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            yield restore(json.loads(line), allow=_ALLOWED)

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            self._file.close()
            self._file = None
