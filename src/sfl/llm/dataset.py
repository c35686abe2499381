"""Documents for causal language modelling: load, clean, share among sites, and hold out without leakage.

documents, report = load_documents("letters.jsonl")
data = federate_documents(documents, partition="key:author", num_clients=4, seed=0)
data.sites[0].train, data.sites[0].held_out, data.held_out
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from sfl.errors import DataError, nearest
from sfl.llm.documents import Document, Turns, clean, turns_of
from sfl.train import sources
from sfl.train.cleaning import CleaningReport
from sfl.train.federated import Federated, Shares, federate, most_frequent
from sfl.train.sources import Shelf, Source, content, is_parquet, is_table, names_of_sites, text_of
from sfl.train.tables import Table, csv_table, hub_table, json_table, parquet_table, saved_table

__all__ = [  # noqa: RUF022 - plain order
    "CleaningReport",
    "Document",
    "FederatedDocuments",
    "TEXTS",
    "federate_documents",
    "figures",
    "load_documents",
    "load_sites",
]

TEXTS = Shelf(
    what="text",
    kinds="a TXT, JSONL, CSV or Parquet file",
    suffixes=(".txt", ".jsonl", ".csv", ".tsv", ".parquet"),
    package="sfl.llm",
    bundled="speeches_sample.jsonl.gz",
)
"""Speeches of eight plays ship with SFL, and are used where no data are named."""

_PARAGRAPHS = re.compile(r"\n[ \t]*\n\s*")
_KINDS = ("speaker", "author", "label", "work", "source")

FederatedDocuments: TypeAlias = Federated[Document]


def load_documents(data: str = "") -> tuple[list[Document], CleaningReport]:
    """All usable documents that ``data`` names, in file order; what is said twice is kept once.

    Args:
        data: Empty for the bundled sample, or a path, ``path:column``, folder, comma list, pattern, or ``hf:NAME``
            (see `sfl.train.sources.resolve`). A text file's documents are parted by blank lines.

    Raises:
        DataError: A source is missing or unreadable, or nothing in it is usable.
        MissingExtraError: A source needs pyarrow or datasets, which is not installed.
    """
    seen: set[str] = set()
    parts = [clean(_read(source), source=source.text, seen=seen) for source in sources.resolve(data, TEXTS)]
    documents = [document for part, _ in parts for document in part]
    name = parts[0][1].source if len(parts) == 1 else data
    report = CleaningReport.merge(name, (part for _, part in parts))
    _require_usable(report)
    return documents, report


def load_sites(data: str) -> tuple[dict[str, list[Document]], CleaningReport]:
    """The same, by file, for partition ``files``: one file is one site, called as the file."""
    found = sources.resolve(data, TEXTS)
    sites: dict[str, list[Document]] = {}
    reports: list[CleaningReport] = []
    for name, source in zip(names_of_sites(found), found, strict=True):
        sites[name], report = clean(_read(source), source=source.text)
        _require_usable(report)
        reports.append(report)
    return sites, CleaningReport.merge(data, reports)


def federate_documents(
    documents: Sequence[Document] | Mapping[str, Sequence[Document]],
    *,
    partition: str,
    num_clients: int,
    seed: int,
    eval_fraction: float = 0.1,
    global_fraction: float = 0.1,
) -> FederatedDocuments:
    """Share documents among sites and hold some out; see `sfl.train.federated.federate`.

    A field of the partition is a column of the source: ``work`` or ``speaker`` in the bundled sample.
    """
    shares = Shares(
        partition=partition,
        num_clients=num_clients,
        seed=seed,
        eval_fraction=eval_fraction,
        global_fraction=global_fraction,
    )
    return federate(documents, shares, what="text", hint="name a column after a colon, as in key:author")


def figures(documents: Sequence[Document]) -> dict[str, Any]:
    """What the report says of some documents: their characters, and whose they are most often."""
    names = {name for document in documents for name in document.fields}
    kind = next((name for name in _KINDS if name in names), "")
    return {
        "size": sum(document.size for document in documents),
        "top": most_frequent(document.value(kind) for document in documents) if kind else [],
    }


def _read(source: Source) -> Iterator[tuple[str, Turns | None, Mapping[str, str]]]:
    """Id, turns and other fields of each record."""
    if source.hub:
        return _records(hub_table(source.hub, source.text, source.split, nested=True), source)
    if source.path is not None and source.path.is_dir():
        return _records(saved_table(source.path, source.text, nested=True), source)
    found = content(source)
    if source.path is not None and is_parquet(source, found):
        return _records(parquet_table(source.path, source.text, nested=True), source)
    text = text_of(source, found)
    name = source.text.lower() if source.path is None else source.path.name.lower()
    if name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return _records(json_table(text, source.text), source)
    if is_table(source, ".csv", ".tsv"):
        return _records(csv_table(text, source.text, "give JSON lines"), source)
    paragraphs = _PARAGRAPHS.split(text.replace("\r\n", "\n").removeprefix("\ufeff").strip())
    return (("", (("text", paragraph),), {}) for paragraph in paragraphs)


def _records(table: Table, source: Source) -> Iterator[tuple[str, Turns | None, Mapping[str, str]]]:
    known = False
    for row in table.rows:
        turns, used = turns_of(row, source.column)
        if not known and not used - {""}:
            _refuse(list(row), source)
        known = True
        fields = {
            str(name): str(value).strip()
            for name, value in row.items()
            if name not in used and isinstance(value, str | int | float)
        }
        yield fields.get("id", ""), turns, fields


def _refuse(names: Sequence[str], source: Source) -> None:
    rule = f"the column {source.column!r}" if source.column else "text, prompt and completion, or messages"
    raise DataError(
        f"{source.text} must have {rule}, got the columns {', '.join(names) or 'none'}. "
        f"{nearest(source.column or 'text', names) if names else ''} "
        "Name the column of texts after a colon, as in data.jsonl:body."
    )


def _require_usable(report: CleaningReport) -> None:
    if not report.kept:
        lines = "; ".join(report.warnings())
        raise DataError(
            f"{report.source} must hold at least one usable document, got {report.read} records ({report.counts()}). "
            f"Check that it holds texts{f': {lines}' if lines else ''}."
        )
