"""What cleaning did to the records of a source: all that is dropped is counted, and said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["CleaningReport", "Dropped"]


@dataclass(frozen=True)
class CleaningReport:
    """What cleaning did: ``read == kept + sum(dropped.values())``.

    Attributes:
        source: The file or data set.
        read: Records in the source.
        kept: Records that are usable.
        dropped: How many were not, by reason.
        lines: One line for people for each source and reason.
    """

    source: str
    read: int = 0
    kept: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])
    lines: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        """A line for each reason for which records were dropped, with the first of them as example."""
        return list(self.lines)

    def counts(self) -> str:
        """What was dropped and why, in words: ``"2 invalid, 1 empty"``."""
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count) or "none dropped"

    @classmethod
    def merge(cls, source: str, reports: Iterable[CleaningReport]) -> CleaningReport:
        """The sum over several sources."""
        parts = list(reports)
        dropped: dict[str, int] = {}
        for part in parts:
            for reason, count in part.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + count
        lines = tuple(line for part in parts for line in part.lines)
        return cls(source, sum(part.read for part in parts), sum(part.kept for part in parts), dropped, lines)


class Dropped:
    """Counts what is dropped, and keeps the first of each kind.

    Args:
        reasons: Why a record may be dropped, in a warning and in short.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self._reasons = reasons
        self._counts = dict.fromkeys(reasons, 0)
        self._first: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        """One more."""
        self._counts[reason] += 1
        self._first.setdefault(reason, example)

    def report(self, source: str, kept: int) -> CleaningReport:
        """What was done to a source of which so many records were kept."""
        lines = tuple(self._line(source, reason, count) for reason, count in self._counts.items() if count)
        dropped = {self._reasons[reason]: count for reason, count in self._counts.items()}
        return CleaningReport(source, kept + sum(dropped.values()), kept, dropped, lines)

    def _line(self, source: str, reason: str, count: int) -> str:
        noun = "record" if count == 1 else "records"
        return f"{source}: {count} {noun} dropped: {reason} (first: {self._first[reason]})"
