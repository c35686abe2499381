"""FASTA text to raw proteins, with the headers of UniProt, UniRef and plain files."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sfl.errors import DataError
from sfl.esm2.proteins import RawProtein

_ORGANISM = re.compile(r"(?:^|\s)(?:OS|Tax)=(.*?)(?=\s+(?:OX|GN|PE|SV|TaxID|RepID)=|$)")
_DATABASES = frozenset({"sp", "tr", "ref", "gb", "emb", "dbj", "gi", "lcl"})


def parse_fasta(text: str, source: str) -> Iterator[RawProtein]:
    """The records of ``text``, in order; a ``>`` opens a record at the start of a line only.

    Raises:
        DataError: ``text`` does not start with a header.
    """
    body = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff \t\n")
    while body.startswith(";"):  # comments of the first FASTA format
        body = body.partition("\n")[2].lstrip()
    if not body.startswith(">"):
        raise DataError(
            f"{source} must be FASTA (its first line starting with '>'), got {body[:30]!r}. "
            "Name a FASTA, CSV or Parquet file of proteins."
        )
    for block in body.removeprefix(">").split("\n>"):
        header, _, residues = block.partition("\n")
        name, organism = parse_header(header)
        yield RawProtein(name, residues, organism)


def parse_header(header: str) -> tuple[str, str]:
    """Accession and organism of a FASTA header (without its ``>``); empty where it names none.

    Example:
        >>> parse_header("sp|P69905|HBA_HUMAN Hemoglobin OS=Homo sapiens OX=9606 GN=HBA1")
        ('P69905', 'Homo sapiens')
    """
    words = header.split(maxsplit=1)
    if not words:
        return "", ""
    parts = words[0].split("|")
    name = parts[1] if len(parts) > 1 and parts[0] in _DATABASES else parts[0]
    found = _ORGANISM.findall(header)
    return name, found[-1].strip() if found else ""
