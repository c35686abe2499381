"""The figures of a run as files: ``metrics.jsonl``, ``metrics.csv`` and TensorBoard events.

``metrics.jsonl`` is the record: one line a round, every field of ``RoundFinished`` and of its sites. What is not finite
is one of the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``. The two others are derived from it.

``metrics.csv`` is tidy, one figure a line, under the header ``round,stage,scope,status,metric,value``:

=============  ================  ==========================================================================
stage          scope             metric
=============  ================  ==========================================================================
a task's name  ``all``           the weighted mean over the used sites (``fit``, ``evaluate``)
a task's name  a site            what the site reported, then its ``seconds``, ``nbytes``, ``num_examples``
``evaluate``   ``global``        the global model on the global held-out data
``time``       ``all``           seconds of each phase of the round
``traffic``    ``all``           ``bytes_down``, ``bytes_up``
=============  ================  ==========================================================================

``status`` is used, failed, late or rejected for a site, and empty elsewhere; what is not finite is nan, inf or -inf.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from sfl.core.events import Event, RoundFinished, SiteFinished
from sfl.core.task import EVALUATE, FIT, Status
from sfl.errors import DataError, MissingExtraError
from sfl.io.jsonable import dump_line, to_float, to_jsonable
from sfl.io.tensorboard import ScalarFile
from sfl.io.tree import write_text, writing

__all__ = ["CSV_HEADER", "JSONL", "MetricsWriter", "RoundEntry", "read_metrics", "read_rounds"]

JSONL = "metrics.jsonl"
CSV_HEADER = ("round", "stage", "scope", "status", "metric", "value")

RoundEntry: TypeAlias = dict[str, Any]
"""One line of ``metrics.jsonl``: the fields of ``RoundFinished``, its sites as dicts, its figures as floats."""

_log = logging.getLogger(__name__)


class MetricsWriter:
    """Observer that writes each finished round to disk before the next one starts.

    Args:
        folder: The run's folder; made if it is not there.
        resume_after: The round that the run goes on after. Lines of later rounds, and a last line that a crash tore,
            are dropped, so that the files end up as those of a run that was never stopped. ``-1`` begins empty files.

    Raises:
        DataError: ``metrics.jsonl`` is broken somewhere else than in its last line.
        CheckpointError: The folder cannot be written.
    """

    def __init__(self, folder: str | Path, resume_after: int = -1) -> None:
        self.folder = Path(folder)
        self._jsonl = self.folder / JSONL
        self._csv = self.folder / "metrics.csv"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in _entries_or_none(self._jsonl, resume_after) if entry["round"] <= resume_after]
        if kept and kept[-1]["round"] < resume_after:
            _log.warning("%s ends at round %d; round %d was lost.", self._jsonl, kept[-1]["round"], resume_after)
        write_text(self._jsonl, "".join(dump_line(entry) + "\n" for entry in kept))
        write_text(self._csv, _csv_text([CSV_HEADER]) + "".join(map(_csv_rows, kept)))
        self._scalars = _open_scalars(self.folder / "tensorboard")
        for entry in kept:
            self._write_scalars(entry)

    def __call__(self, event: Event) -> None:
        """Writes a finished round; other events are not for files."""
        if not isinstance(event, RoundFinished):
            return
        entry = _restored(to_jsonable(event))
        _append(self._jsonl, dump_line(entry) + "\n")
        _append(self._csv, _csv_rows(entry))
        self._write_scalars(entry)

    def _write_scalars(self, entry: RoundEntry) -> None:
        if self._scalars is not None:
            with writing(self.folder / "tensorboard"):
                self._scalars.write(entry["round"], dict(_scalars(entry)))

    def close(self) -> None:
        """Closes the TensorBoard file. The others are never left open."""
        if self._scalars is not None:
            with suppress(OSError):  # every write was flushed; a full disk has been said by then
                self._scalars.close()
            self._scalars = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[RoundEntry]:
    """The rounds in a ``metrics.jsonl``, or in the one of a run's folder, in order; a torn last line is left out.

    Raises:
        DataError: There is no such file, or a line other than the last is broken.
    """
    path = Path(path)
    path = path / JSONL if path.is_dir() else path
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"metrics must be in {path}, and it cannot be read: {error.strerror}.") from error
    entries: list[RoundEntry] = []
    for number, line in enumerate(lines, start=1):
        entry = _parse(line)
        if entry is not None:
            entries.append(entry)
        elif number < len(lines):
            raise DataError(f"{path} line {number} must be a finished round as JSON, got {line[:60]!r}. Remove it.")
    return entries


def read_rounds(path: str | Path) -> list[RoundFinished]:
    """What ``read_metrics`` reads, as the events they were.

    Raises:
        DataError: There is no such file, or it holds something else.
    """
    try:
        return [_event(entry) for entry in read_metrics(path)]
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(f"{path} must hold the rounds of this version of SFL, got one that differs: {error}") from error


def _event(entry: RoundEntry) -> RoundFinished:
    sites: Any = tuple(SiteFinished(**site | {"status": Status(site["status"])}) for site in entry["sites"])
    fields: RoundEntry = entry | {"sites": sites}
    return RoundFinished(**fields)


def _parse(line: bytes) -> RoundEntry | None:
    try:
        entry = json.loads(line)
        if not isinstance(entry["round"], int):
            return None
        entry = _restored(entry)
        list(_tidy(entry))  # raises where a field is missing
        return entry
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _restored(entry: RoundEntry) -> RoundEntry:
    """The entry with figures as floats, NaN and the infinities among them."""
    out = dict(entry)
    for name in ("fit", "evaluation", "central", "seconds"):
        out[name] = {key: to_float(value) for key, value in entry[name].items()}
    out["sites"] = [
        site
        | {"metrics": {key: to_float(value) for key, value in site["metrics"].items()}}
        | {name: to_float(site[name]) for name in ("seconds", "num_examples")}
        for site in entry["sites"]
    ]
    return out


def _entries_or_none(path: Path, resume_after: int) -> list[RoundEntry]:
    return read_metrics(path) if resume_after >= 0 and path.exists() else []


def _append(path: Path, text: str) -> None:
    with writing(path), path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _csv_text(rows: list[tuple[object, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _csv_rows(entry: RoundEntry) -> str:
    return _csv_text([(entry["round"], *key, repr(to_float(value))) for key, value in _tidy(entry)])


def _tidy(entry: RoundEntry) -> Iterator[tuple[tuple[str, str, str, str], Any]]:
    """((stage, scope, status, metric), value) of every figure of a round."""
    groups: list[tuple[str, str, str, dict[str, Any]]] = [
        (FIT, "all", "", entry["fit"]),
        (EVALUATE, "all", "", entry["evaluation"]),
        (EVALUATE, "global", "", entry["central"]),
    ]
    for site in entry["sites"]:
        figures = dict(site["metrics"]) | {name: site[name] for name in ("seconds", "nbytes", "num_examples")}
        groups.append((site["stage"], site["site"], site["status"], figures))
    groups.append(("time", "all", "", entry["seconds"]))
    groups.append(("traffic", "all", "", {name: entry[name] for name in ("bytes_down", "bytes_up")}))
    for stage, scope, status, figures in groups:
        for metric, value in figures.items():
            yield (stage, scope, status, metric), value


def _scalars(entry: RoundEntry) -> Iterator[tuple[str, float]]:
    """TensorBoard tags, grouped by metric so that the curves of one metric stand together."""
    for source, name in (("central", "global"), ("evaluation", "evaluate"), ("fit", "fit")):
        for metric, value in entry[source].items():
            yield f"{metric}/{name}", value
    for site in entry["sites"]:
        for metric, value in site["metrics"].items():
            yield f"{metric}/{site['stage']}/{site['site']}", value
    for phase, seconds in entry["seconds"].items():
        yield f"seconds/{phase}", seconds
    for name in ("bytes_down", "bytes_up"):
        yield f"traffic/{name}", float(entry[name])


def _open_scalars(folder: Path) -> ScalarFile | None:
    try:
        with writing(folder):
            return ScalarFile(folder)
    except MissingExtraError as error:
        _log.warning("No TensorBoard events are written: %s", error)
        return None
