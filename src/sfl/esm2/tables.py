"""Proteins in tables: CSV and TSV text, Parquet files, and Hugging Face data sets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfl.errors import DataError, MissingExtraError, nearest
from sfl.esm2.proteins import RawProtein
from sfl.train.hub import hub_refusal, is_offline

_SEQUENCE = ("sequence", "seq", "protein", "protein_sequence", "aa_seq")
_ID = ("id", "accession", "entry", "protein_id", "name")
_ORGANISM = ("organism", "species")


def read_csv(text: str, source: str, column: str = "") -> Iterator[RawProtein]:
    """Proteins of comma- or tab-separated ``text`` whose first line names the columns.

    Raises:
        DataError: There is no sequence column, or the text is no table.
    """
    table = text.removeprefix("\ufeff")
    delimiter = "\t" if "\t" in table.partition("\n")[0] else ","
    reader = csv.reader(io.StringIO(table, newline=""), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        picked = _Columns(header, source, column)
        for row in reader:
            if row:
                yield picked.record(dict(zip(header, row, strict=False)))
    except csv.Error as error:
        raise DataError(
            f"{source} must be a table of comma- or tab-separated columns, got a line that is not: {error} "
            f"(line {reader.line_num}). Mend the line, or give FASTA."
        ) from error


def read_parquet(path: Path, source: str, column: str = "") -> Iterator[RawProtein]:
    """Proteins of a Parquet file; columns that hold neither text nor whole numbers are left alone.

    Raises:
        DataError: It is no Parquet file, or has no sequence column of text.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    try:
        table = pq.read_table(path, columns=_plain_columns(pq.read_schema(path)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{source} must be a Parquet file, got one that cannot be read: {_first_line(error)}. "
            "Write or fetch it again."
        ) from error
    return _table_records(table, source, column)


def read_saved(folder: Path, source: str, split: str = "", column: str = "") -> Iterator[RawProtein]:
    """Proteins of a data set that ``datasets`` saved with ``save_to_disk``."""
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{source} must be a folder written by save_to_disk, got one that cannot be read: {_first_line(error)}. "
            "Save the data set again."
        ) from error
    return _dataset_records(loaded, source, split, column)


def read_hub(name: str, source: str, split: str = "", column: str = "") -> Iterator[RawProtein]:
    """Proteins of a data set on the Hugging Face hub, or of its cached copy if HF_HUB_OFFLINE=1.

    Raises:
        DataError: The hub cannot be reached (found out at once, without retries), or has no such data set.
        MissingExtraError: datasets is not installed.
    """
    refusal = "" if is_offline() else hub_refusal()
    if refusal:
        raise DataError(
            f"{source} must be reachable on the Hugging Face hub, got {refusal}. Use a local FASTA, CSV or Parquet "
            "file or a saved data set folder, or set HF_HUB_OFFLINE=1 if it is in the cache."
        )
    datasets = _datasets()
    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source} must be a data set on the Hugging Face hub, got: {_first_line(error)}. "
            "Check the name, or give a FASTA, CSV or Parquet file."
        ) from error
    return _dataset_records(loaded, source, split, column)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data") from error
    return datasets


def _dataset_records(loaded: Any, source: str, split: str, column: str) -> Iterator[RawProtein]:
    if isinstance(loaded, dict):  # a DatasetDict: one data set for each split
        splits = {str(key): value for key, value in loaded.items()}
        wanted = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
        if wanted not in splits:
            raise DataError(
                f"{source} must have the split {wanted!r}, got splits {', '.join(splits)}. {nearest(wanted, splits)}"
            )
        loaded = splits[wanted]
    table = loaded.with_format("arrow")[:]
    return _table_records(table.select(_plain_columns(table.schema)), source, column)


def _plain_columns(schema: Any) -> list[str]:
    import pyarrow.types as kinds

    plain = (kinds.is_string, kinds.is_large_string, kinds.is_dictionary, kinds.is_integer)
    return [field.name for field in schema if any(is_kind(field.type) for is_kind in plain)]


def _table_records(table: Any, source: str, column: str) -> Iterator[RawProtein]:
    names = [str(name) for name in table.column_names]
    picked = _Columns(names, source, column)
    for batch in table.to_batches(max_chunksize=10_000):
        columns = [batch.column(place).to_pylist() for place in range(len(names))]
        for row in zip(*columns, strict=True):
            values = {name: "" if value is None else str(value) for name, value in zip(names, row, strict=True)}
            yield picked.record(values)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


class _Columns:
    """Which columns of a table hold the sequence, the accession and the organism."""

    def __init__(self, names: Sequence[str], source: str, wanted: str) -> None:
        lower = {name.lower(): name for name in reversed(names)}
        self.sequence = wanted if wanted in names else _first(lower, [wanted.lower()] if wanted else _SEQUENCE)
        self.id = _first(lower, _ID)
        self.organism = _first(lower, _ORGANISM)
        if not self.sequence:
            rule = f"the column {wanted!r}" if wanted else "a text column 'sequence'"
            known = [name for name in names if name]
            hint = nearest(wanted or "sequence", known) if known else ""
            raise DataError(
                f"{source} must have {rule}, got {len(known)} columns. {hint} "
                "Name the column of sequences after a colon, as in data.csv:sequence."
            )

    def record(self, values: Mapping[str, str]) -> RawProtein:
        fields = {name: value.strip() for name, value in values.items() if name != self.sequence}
        for name in ("genus", "label"):
            given = next((value for key, value in fields.items() if key.lower() == name), "")
            if given:
                fields[name] = given
        accession, organism = fields.get(self.id, ""), fields.get(self.organism, "")
        return RawProtein(accession, values.get(self.sequence, ""), organism, fields)


def _first(lower: Mapping[str, str], names: Iterable[str]) -> str:
    return next((lower[name] for name in names if name in lower), "")
