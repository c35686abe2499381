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
from sfl.train.cleaning import CleaningReport
from sfl.train.collection import Collection
from sfl.train.federated import Federated, most_frequent
from sfl.train.sources import Shelf, Source, content, is_parquet, is_table, text_of
from sfl.train.tables import Table, csv_table, hub_table, json_table, parquet_table, saved_table

__all__ = [  # noqa: RUF022 - plain order
    "COLLECTION",
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


def _read(source: Source, seen: set[str]) -> tuple[list[Document], CleaningReport]:
    return clean(_rows(source), source=source.text, seen=seen)


COLLECTION = Collection(
    shelf=TEXTS,
    read=_read,
    record="document",
    content="text",
    holds="texts",
    hint="name a column after a colon, as in key:author",
)
"""Documents. A field of their partition is a column of the source: ``work`` or ``speaker`` in the bundled sample."""

load_documents = COLLECTION.load
load_sites = COLLECTION.load_sites
federate_documents = COLLECTION.federate


def figures(documents: Sequence[Document]) -> dict[str, Any]:
    """What the report says of some documents: their characters, and whose they are most often."""
    names = {name for document in documents for name in document.fields}
    kind = next((name for name in _KINDS if name in names), "")
    return {
        "size": sum(document.size for document in documents),
        "top": most_frequent(document.value(kind) for document in documents) if kind else [],
    }


def _rows(source: Source) -> Iterator[tuple[str, Turns | None, Mapping[str, str]]]:
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
