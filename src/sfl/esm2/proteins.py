"""What a protein record is, and the cleaning that every source goes through."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sfl.esm2.alphabet import RARE, STANDARD
from sfl.train.cleaning import CleaningReport, Dropped

_INVALID = re.compile(f"[^{STANDARD}{RARE}]")
_REASONS = {
    "empty": "empty",
    "invalid residues": "invalid",
    "too short": "too short",
    "duplicate sequence": "duplicate",
}
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

    @property
    def key(self) -> str:
        """Two records of one sequence are the same."""
        return self.sequence

    def names(self) -> Iterable[str]:
        """What every record has, and the columns of its source."""
        return (*ATTRIBUTES, *self.fields)


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
    dropped = Dropped(_REASONS)
    for number, item in enumerate(raw, start=1):
        name = item.id or f"record-{number}"
        sequence = "".join(item.sequence.split()).rstrip("*")
        sequence = sequence.upper() if sequence.isascii() else sequence  # 'ß' would become two residues
        problem = _problem(sequence, min_length, known)
        if problem:
            dropped.add(problem[0], f"{name}{problem[1]}")
            continue
        known.add(sequence)
        records.append(_record(name, sequence, item))
    return records, dropped.report(source, len(records))


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
