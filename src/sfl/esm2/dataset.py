"""Proteins for federated masked-language modelling: load, clean, share among sites, and hold out without leakage.

records, report = load_proteins("proteins.fasta")
data = federate_proteins(records, partition="key:organism", num_clients=4, seed=0)
data.sites[0].train, data.sites[0].held_out, data.held_out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from sfl.esm2.alphabet import PackedProteins, encode
from sfl.esm2.proteins import ProteinRecord, clean, genus
from sfl.esm2.sources import PROTEINS, read
from sfl.train.cleaning import CleaningReport
from sfl.train.collection import Collection
from sfl.train.federated import Federated, SiteRecords, check_leakage, most_frequent
from sfl.train.sources import Source

__all__ = [
    "COLLECTION",
    "CleaningReport",
    "FederatedProteins",
    "PackedProteins",
    "ProteinRecord",
    "SiteProteins",
    "check_leakage",
    "encode",
    "federate_proteins",
    "figures",
    "genus",
    "load_proteins",
    "load_sites",
]

SiteProteins: TypeAlias = SiteRecords[ProteinRecord]
FederatedProteins: TypeAlias = Federated[ProteinRecord]


def _read(source: Source, seen: set[str]) -> tuple[list[ProteinRecord], CleaningReport]:
    return clean(read(source), source=source.text, seen=seen)


COLLECTION = Collection(
    shelf=PROTEINS,
    read=_read,
    record="protein",
    content="sequence",
    holds="amino-acid sequences",
    hint="FASTA headers name an organism as OS=Homo sapiens",
)
"""Proteins. A field of their partition is organism, genus, label or a column of the source."""

load_proteins = COLLECTION.load
load_sites = COLLECTION.load_sites
federate_proteins = COLLECTION.federate


def figures(records: Sequence[ProteinRecord]) -> dict[str, Any]:
    """What the report says of some proteins: their residues and most frequent organisms."""
    return {
        "size": sum(len(record.sequence) for record in records),
        "top": most_frequent(record.organism for record in records),
    }
