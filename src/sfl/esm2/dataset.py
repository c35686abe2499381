"""Proteins for federated masked-language modelling: load, clean, share among sites, and hold out without leakage.

records, report = load_proteins("proteins.fasta")
data = federate_proteins(records, partition="key:organism", num_clients=4, seed=0)
data.sites[0].train, data.sites[0].held_out, data.held_out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sfl.errors import DataError
from sfl.esm2.alphabet import PackedProteins, encode
from sfl.esm2.proteins import ProteinRecord, clean, genus
from sfl.esm2.sources import read, resolve
from sfl.train.cleaning import CleaningReport
from sfl.train.federated import Federated, Shares, SiteRecords, check_leakage, federate, most_frequent
from sfl.train.sources import names_of_sites

__all__ = [
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


def federate_proteins(
    records: Sequence[ProteinRecord] | Mapping[str, Sequence[ProteinRecord]],
    *,
    partition: str,
    num_clients: int,
    seed: int,
    eval_fraction: float = 0.1,
    global_fraction: float = 0.1,
) -> FederatedProteins:
    """Share proteins among sites and hold some out; see `sfl.train.federated.federate`.

    A field of the partition is organism, genus, label or a column of the source.
    """
    shares = Shares(
        partition=partition,
        num_clients=num_clients,
        seed=seed,
        eval_fraction=eval_fraction,
        global_fraction=global_fraction,
    )
    return federate(records, shares, what="sequence", hint="FASTA headers name an organism as OS=Homo sapiens")


def figures(records: Sequence[ProteinRecord]) -> dict[str, Any]:
    """What the report says of some proteins: their residues and most frequent organisms."""
    return {
        "size": sum(len(record.sequence) for record in records),
        "top": most_frequent(record.organism for record in records),
    }


def load_proteins(data: str = "", *, min_length: int = 2) -> tuple[list[ProteinRecord], CleaningReport]:
    """All usable proteins that ``data`` names, in file order; a sequence is kept once.

    Args:
        data: Empty for the bundled sample, or a path, ``path:column``, folder, comma list, pattern, or ``hf:NAME``
            (see `sfl.train.sources.resolve`).
        min_length: Fewest residues of a usable protein.

    Raises:
        DataError: A source is missing or unreadable, or nothing in it is usable.
        MissingExtraError: A source needs pyarrow or datasets, which is not installed.
    """
    seen: set[str] = set()
    parts = [clean(read(s), source=s.text, min_length=min_length, seen=seen) for s in resolve(data)]
    records = [record for part, _ in parts for record in part]
    name = parts[0][1].source if len(parts) == 1 else data
    report = CleaningReport.merge(name, (part for _, part in parts))
    _require_usable(report)
    return records, report


def load_sites(data: str, *, min_length: int = 2) -> tuple[dict[str, list[ProteinRecord]], CleaningReport]:
    """The same, by file, for partition ``files``: one file is one site, called as the file.

    A sequence may still occur in several files: `federate_proteins` keeps it in the first.
    """
    sources = resolve(data)
    sites: dict[str, list[ProteinRecord]] = {}
    reports: list[CleaningReport] = []
    for name, source in zip(names_of_sites(sources), sources, strict=True):
        sites[name], report = clean(read(source), source=source.text, min_length=min_length)
        _require_usable(report)
        reports.append(report)
    return sites, CleaningReport.merge(data, reports)


def _require_usable(report: CleaningReport) -> None:
    if not report.kept:
        lines = "; ".join(report.warnings())
        raise DataError(
            f"{report.source} must hold at least one usable protein, got {report.read} records ({report.counts()}). "
            f"Check that it holds amino-acid sequences{f': {lines}' if lines else ''}."
        )
