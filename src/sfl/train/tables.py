"""Tables as rows: CSV and TSV text, JSON lines, Parquet files, and Hugging Face data sets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sfl.errors import DataError, MissingExtraError, nearest
from sfl.train.hub import hub_refusal, is_offline

__all__ = ["Table", "csv_table", "first_of", "hub_table", "json_table", "parquet_table", "saved_table"]


@dataclass(frozen=True)
class Table:
    """A table that is read once.

    Attributes:
        names: Its columns; empty where only its rows say them.
        rows: Values by column. A cell that holds nothing is an empty text.
    """

    names: Sequence[str]
    rows: Iterable[Mapping[str, Any]]


def csv_table(text: str, source: str, remedy: str) -> Table:
    """Comma- or tab-separated ``text`` whose first line names the columns; all values are texts.

    Args:
        text: The table.
        source: How messages call it.
        remedy: What to give instead of what is no table.

    Raises:
        DataError: The text is no table; also as its rows are drawn.
    """
    table = text.removeprefix("\ufeff")
    delimiter = "\t" if "\t" in table.partition("\n")[0] else ","
    reader = csv.reader(io.StringIO(table, newline=""), delimiter=delimiter)

    def no_table(error: csv.Error) -> DataError:
        return DataError(
            f"{source} must be a table of comma- or tab-separated columns, got a line that is not: {error} "
            f"(line {reader.line_num}). Mend the line, or {remedy}."
        )

    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise no_table(error) from error

    def rows() -> Iterator[Mapping[str, Any]]:
        try:
            for row in reader:
                if row:
                    yield dict(zip(header, row, strict=False))
        except csv.Error as error:
            raise no_table(error) from error

    return Table(header, rows())


def json_table(text: str, source: str) -> Table:
    """One JSON object a line; blank lines do not count.

    Raises:
        DataError: A line is none, as it is drawn.
    """

    def rows() -> Iterator[Mapping[str, Any]]:
        for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                found = cast("object", json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{source} must hold one JSON object a line, got line {number}, which is not: {error}. Mend it."
                ) from error
            if not isinstance(found, dict):
                raise DataError(
                    f"{source} must hold one JSON object a line, got {type(found).__name__} in line {number}. Mend it."
                )
            yield cast("dict[str, Any]", found)

    return Table((), rows())


def parquet_table(path: Path, source: str, *, nested: bool = False) -> Table:
    """A Parquet file; columns that hold neither text nor whole numbers are left alone, unless ``nested`` is wanted.

    Raises:
        DataError: It is no Parquet file.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    try:
        return _arrow_table(pq.read_table(path, columns=_wanted(pq.read_schema(path), nested)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{source} must be a Parquet file, got one that cannot be read: {_first_line(error)}. "
            "Write or fetch it again."
        ) from error


def saved_table(folder: Path, source: str, split: str = "", *, nested: bool = False) -> Table:
    """A data set that ``datasets`` saved with ``save_to_disk``.

    Raises:
        DataError: It cannot be read, or has no such split.
        MissingExtraError: datasets is not installed.
    """
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{source} must be a folder written by save_to_disk, got one that cannot be read: {_first_line(error)}. "
            "Save the data set again."
        ) from error
    return _dataset_table(loaded, source, split, nested)


def hub_table(name: str, source: str, split: str = "", *, nested: bool = False) -> Table:
    """A data set on the Hugging Face hub, or its cached copy if HF_HUB_OFFLINE=1.

    Raises:
        DataError: The hub cannot be reached (found out at once, without retries), or has no such data set.
        MissingExtraError: datasets is not installed.
    """
    refusal = "" if is_offline() else hub_refusal()
    if refusal:
        raise DataError(
            f"{source} must be reachable on the Hugging Face hub, got {refusal}. Use a local file or a saved data set "
            "folder, or set HF_HUB_OFFLINE=1 if it is in the cache."
        )
    datasets = _datasets()
    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source} must be a data set on the Hugging Face hub, got: {_first_line(error)}. "
            "Check the name, or give a local file."
        ) from error
    return _dataset_table(loaded, source, split, nested)


def first_of(known: Iterable[str], names: Iterable[str]) -> str:
    """The first of ``names`` that is among ``known``, whatever the case of its letters; empty if none is."""
    lower = {name.lower(): name for name in reversed(list(known))}
    return next((lower[name] for name in names if name in lower), "")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data") from error
    return datasets


def _dataset_table(loaded: Any, source: str, split: str, nested: bool) -> Table:
    if isinstance(loaded, dict):  # a DatasetDict: one data set for each split
        splits = {str(key): value for key, value in loaded.items()}
        wanted = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
        if wanted not in splits:
            raise DataError(
                f"{source} must have the split {wanted!r}, got splits {', '.join(splits)}. {nearest(wanted, splits)}"
            )
        loaded = splits[wanted]
    table = loaded.with_format("arrow")[:]
    return _arrow_table(table.select(_wanted(table.schema, nested)))


def _wanted(schema: Any, nested: bool) -> list[str]:
    import pyarrow.types as kinds

    if nested:
        return [field.name for field in schema]
    plain = (kinds.is_string, kinds.is_large_string, kinds.is_dictionary, kinds.is_integer)
    return [field.name for field in schema if any(is_kind(field.type) for is_kind in plain)]


def _arrow_table(table: Any) -> Table:
    names = [str(name) for name in table.column_names]

    def rows() -> Iterator[Mapping[str, Any]]:
        for batch in table.to_batches(max_chunksize=10_000):
            columns = [batch.column(place).to_pylist() for place in range(len(names))]
            for row in zip(*columns, strict=True):
                yield {name: "" if value is None else value for name, value in zip(names, row, strict=True)}

    return Table(names, rows())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
