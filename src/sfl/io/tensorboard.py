"""Scalars as TensorBoard events, through the ``tensorboard`` package alone: no torch and no tensorflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from sfl.errors import MissingExtraError

__all__ = ["ScalarFile"]

_NAME = "events.out.tfevents.0000000000.sfl"


class ScalarFile:
    """One event file in ``folder``, begun anew; each ``write`` is on disk when it returns.

    The package's own ``EventFileWriter`` imports tensorflow where that is installed and writes from a thread; the
    record format below it does neither.

    Raises:
        MissingExtraError: ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "report") from error
        folder.mkdir(parents=True, exist_ok=True)
        self._event = Event
        self._records = RecordWriter((folder / _NAME).open("wb"))
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one figure for each tag."""
        event = self._event(wall_time=time.time(), step=step)
        for tag, value in scalars.items():
            event.summary.value.add(tag=tag, simple_value=value)
        self._put(event)

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _put(self, event: object) -> None:
        self._records.write(event.SerializeToString())  # pyright: ignore[reportAttributeAccessIssue]
        self._records.flush()
