"""What ``--data`` may say of proteins, and how its files are read: by their content, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sfl.errors import DataError, nearest
from sfl.esm2.fasta import parse_fasta
from sfl.esm2.proteins import RawProtein
from sfl.train.sources import Shelf, Source, content, is_parquet, is_table, text_of
from sfl.train.tables import Table, csv_table, first_of, hub_table, parquet_table, saved_table

PROTEINS = Shelf(
    what="protein",
    kinds="a FASTA, CSV or Parquet file",
    suffixes=(".fasta", ".fa", ".faa", ".fas", ".csv", ".tsv", ".parquet"),
    package="sfl.esm2",
    bundled="uniprot_sample.fasta.gz",
)
"""The UniProt sample ships with SFL, and is used where no data are named."""

_SEQUENCE = ("sequence", "seq", "protein", "protein_sequence", "aa_seq")
_ID = ("id", "accession", "entry", "protein_id", "name")
_ORGANISM = ("organism", "species")


def read(source: Source) -> Iterable[RawProtein]:
    """The raw records of ``source``.

    Raises:
        DataError: It cannot be read, or is not what it must be.
        MissingExtraError: It needs a package that is not installed.
    """
    if source.hub:
        return _records(hub_table(source.hub, source.text, source.split), source)
    if source.path is not None and source.path.is_dir():
        return _records(saved_table(source.path, source.text), source)
    found = content(source)
    if source.path is not None and is_parquet(source, found):
        return _records(parquet_table(source.path, source.text), source)
    text = text_of(source, found)
    if is_table(source, ".csv", ".tsv") and not text.lstrip("\ufeff \t\r\n").startswith(">"):
        return _records(csv_table(text, source.text, "give FASTA"), source)
    return parse_fasta(text, source.text)


def _records(table: Table, source: Source) -> Iterator[RawProtein]:
    """Which columns hold the sequence, the accession and the organism is told by their names."""
    wanted = source.column
    sequence = wanted if wanted in table.names else first_of(table.names, [wanted.lower()] if wanted else _SEQUENCE)
    if not sequence:
        rule = f"the column {wanted!r}" if wanted else "a text column 'sequence'"
        known = [name for name in table.names if name]
        hint = nearest(wanted or "sequence", known) if known else ""
        raise DataError(
            f"{source.text} must have {rule}, got {len(known)} columns. {hint} "
            "Name the column of sequences after a colon, as in data.csv:sequence."
        )
    accession, organism = first_of(table.names, _ID), first_of(table.names, _ORGANISM)
    return (_record(row, sequence, accession, organism) for row in table.rows)


def _record(row: Mapping[str, Any], sequence: str, accession: str, organism: str) -> RawProtein:
    fields = {name: str(value).strip() for name, value in row.items() if name != sequence}
    for name in ("genus", "label"):
        given = next((value for key, value in fields.items() if key.lower() == name), "")
        if given:
            fields[name] = given
    return RawProtein(fields.get(accession, ""), str(row.get(sequence, "")), fields.get(organism, ""), fields)
