"""What a site's own code logs while it works, kept for the person who watches the run."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

_FOREIGN = ("flwr", "ray", "nvflare", "grpc", "sfl.engine", "asyncio", "urllib3", "httpx", "filelock", "fsspec")
"""Loggers of the machinery: their lines belong into the engine's log, not on the screen."""

_MOST_LINES = 200
_MOST_CHARACTERS = 500


class _Keeper(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's message; of a flood, the first lines."""
        if record.name.partition(".")[0] in _FOREIGN or record.name.startswith("sfl.engine"):
            return
        if len(self.lines) < _MOST_LINES:
            level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
            try:
                self.lines.append((level + record.getMessage())[:_MOST_CHARACTERS])
            except Exception:  # noqa: BLE001 - a badly formatted call is logging's to report, not the site's to die of
                self.handleError(record)
        elif len(self.lines) == _MOST_LINES:
            self.lines.append("… more lines are in the site's own log")


@contextmanager
def site_logs() -> Generator[list[str]]:
    """Lines logged inside, at INFO and above, by anything but the machinery."""
    root, keeper = logging.getLogger(), _Keeper()
    level = root.level
    root.addHandler(keeper)
    if root.level > logging.INFO or root.level == logging.NOTSET:
        root.setLevel(logging.INFO)
    try:
        yield keeper.lines
    finally:
        root.removeHandler(keeper)
        root.setLevel(level)
