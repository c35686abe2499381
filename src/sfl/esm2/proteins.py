"""What a protein record is, and the cleaning that every source goes through."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sfl.esm2.alphabet import RARE, STANDARD

_INVALID = re.compile(f"[^{STANDARD}{RARE}]")
_QUALIFIERS = frozenset({"candidatus", "uncultured", "unclassified"})


class RawProtein(NamedTuple):
    """A record as its file has it, before cleaning."""

    id: str
    sequence: str
    organism: str = ""
    fields: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class ProteinRecord:
    """A clean protein.

    Attributes:
        id: Accession, or ``record-N`` where the source has none.
        sequence: Residues, upper-case, of the 20 standard ones and XBUZO.
        organism: As the source has it; empty if unknown.
        genus: Lower-case; empty if unknown.
        label: The source's ``label`` column; the genus where there is none.
        fields: All other columns of the source.
    """

    id: str
    sequence: str
    organism: str = ""
    genus: str = ""
    label: str = ""
    fields: Mapping[str, str] = field(default_factory=dict[str, str], compare=False, repr=False)

    def value(self, name: str) -> str:
        """The field ``name``: id, organism, genus, label, or a column of the source; empty if absent."""
        if name in ATTRIBUTES:
            return str(getattr(self, name))
        return self.fields.get(name, "")


ATTRIBUTES = ("id", "organism", "genus", "label")
"""The names of what every record has; a source's columns come on top."""


def genus(organism: str) -> str:
    """The lower-case genus of an organism name; qualifiers in front of it are skipped.

    Example:
        >>> genus("uncultured Candidatus Pelagibacter sp.")
        'pelagibacter'
    """
    words = organism.split()
    while len(words) > 1 and words[0].strip("'[]\"").lower() in _QUALIFIERS:
        words = words[1:]
    return words[0].strip("'[]\"()").lower() if words else ""


@dataclass(frozen=True)
class CleaningReport:
    """What cleaning did: ``read == kept + empty + invalid + too_short + duplicate``.

    Attributes:
        source: The file or data set.
        read: Records in the source.
        kept: Records that are usable.
        empty: Dropped: no residues.
        invalid: Dropped: a character that is no residue.
        too_short: Dropped: below the minimum length.
        duplicate: Dropped: the same sequence as an earlier record.
        lines: One line for people for each source and reason.
    """

    source: str
    read: int = 0
    kept: int = 0
    empty: int = 0
    invalid: int = 0
    too_short: int = 0
    duplicate: int = 0
    lines: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        """A line for each reason for which records were dropped, with the first of them as example."""
        return list(self.lines)

    def counts(self) -> str:
        """What was dropped and why, in words: ``"2 invalid, 1 empty"``."""
        figures = {
            "invalid": self.invalid,
            "empty": self.empty,
            "too short": self.too_short,
            "duplicate": self.duplicate,
        }
        return ", ".join(f"{count} {reason}" for reason, count in figures.items() if count) or "none dropped"

    @classmethod
    def merge(cls, source: str, reports: Iterable[CleaningReport]) -> CleaningReport:
        """The sum over several sources."""
        parts = list(reports)
        names = ("read", "kept", "empty", "invalid", "too_short", "duplicate")
        totals = {name: sum(getattr(part, name) for part in parts) for name in names}
        return cls(source, **totals, lines=tuple(line for part in parts for line in part.lines))


@dataclass
class _Dropped:
    count: int = 0
    first: str = ""

    def add(self, example: str) -> None:
        self.first = self.first or example
        self.count += 1


def clean(
    raw: Iterable[RawProtein], *, source: str, min_length: int = 2, seen: set[str] | None = None
) -> tuple[list[ProteinRecord], CleaningReport]:
    """Normalise and filter records.

    Sequences are upper-cased and lose white space and a trailing ``*``. A record is dropped, and counted once, if its
    sequence is empty, has a character other than the 20 standard residues and XBUZO, is shorter than ``min_length``, or
    occurred before.

    Args:
        raw: The records of one source.
        source: The source's name, for the report.
        min_length: Fewest residues of a usable record.
        seen: Sequences that count as having occurred; those that are kept are added to it.
    """
    known = set[str]() if seen is None else seen
    records: list[ProteinRecord] = []
    dropped = {reason: _Dropped() for reason in ("empty", "invalid residues", "too short", "duplicate sequence")}
    for number, item in enumerate(raw, start=1):
        name = item.id or f"record-{number}"
        sequence = "".join(item.sequence.split()).rstrip("*")
        sequence = sequence.upper() if sequence.isascii() else sequence  # 'ß' would become two residues
        problem = _problem(sequence, min_length, known)
        if problem:
            dropped[problem[0]].add(f"{name}{problem[1]}")
            continue
        known.add(sequence)
        records.append(_record(name, sequence, item))
    empty, invalid, short, duplicate = (drop.count for drop in dropped.values())
    lines = tuple(_line(source, reason, drop) for reason, drop in dropped.items() if drop.count)
    read = len(records) + empty + invalid + short + duplicate
    return records, CleaningReport(source, read, len(records), empty, invalid, short, duplicate, lines)


def _problem(sequence: str, min_length: int, known: set[str]) -> tuple[str, str] | None:
    if not sequence:
        return "empty", ""
    bad = _INVALID.search(sequence)
    if bad:
        return "invalid residues", f" at position {bad.start() + 1}: {bad[0]!r}"
    if len(sequence) < min_length:
        return "too short", f" with {len(sequence)} of at least {min_length} residues"
    return ("duplicate sequence", "") if sequence in known else None


def _record(name: str, sequence: str, item: RawProtein) -> ProteinRecord:
    kind = item.fields.get("genus") or genus(item.organism)
    return ProteinRecord(name, sequence, item.organism, kind, item.fields.get("label") or kind, item.fields)


def _line(source: str, reason: str, drop: _Dropped) -> str:
    noun = "record" if drop.count == 1 else "records"
    return f"{source}: {drop.count} {noun} dropped: {reason} (first: {drop.first})"
