"""What ``--data`` may say, and how its files are read: by their content, whatever they are called."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sfl.errors import DataError, nearest
from sfl.esm2.fasta import parse_fasta
from sfl.esm2.proteins import RawProtein
from sfl.esm2.tables import read_csv, read_hub, read_parquet, read_saved

BUNDLED = "uniprot_sample.fasta.gz"
"""The UniProt sample that ships with SFL, used where no data are named."""

_SUFFIXES = (".fasta", ".fa", ".faa", ".fas", ".csv", ".tsv", ".parquet")
_SAVED = ("state.json", "dataset_dict.json")
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"


@dataclass(frozen=True)
class Source:
    """One file, saved data set or hub data set.

    Attributes:
        text: How messages call it.
        path: Where it is; None for the bundled sample and for the hub.
        column: The column of sequences, for tables; empty to look for one.
        hub: Name on the hub; empty for what is on disk.
        split: Split of a hub data set.
    """

    text: str
    path: Path | None = None
    column: str = ""
    hub: str = ""
    split: str = ""

    @property
    def name(self) -> str:
        """A short name for a site: the file's, without its endings."""
        name = self.path.name if self.path else self.hub or self.text
        stem = name.removesuffix(".gz")
        for suffix in (*_SUFFIXES, ".txt"):
            stem = stem.removesuffix(suffix)
        return stem or name


def resolve(data: str) -> list[Source]:
    """The sources that ``data`` names, in an order that no file system decides.

    ========================  ================================================================
    ``data``                  sources
    ========================  ================================================================
    (empty)                   the bundled UniProt sample
    ``hf:NAME[:SPLIT[:COL]]`` a data set on the Hugging Face hub
    ``PATH[:COLUMN]``         a FASTA, CSV, TSV or Parquet file, or a saved data set
    ``FOLDER[:COLUMN]``       its protein files, by name
    ``a.fasta,b.fasta``       those, in that order
    ``sites/*.fasta``         what matches, by name
    ========================  ================================================================

    Raises:
        DataError: Something is missing, or a folder or pattern has no protein file.
    """
    text = data.strip()
    if not text:
        return [Source(BUNDLED)]
    if text.startswith("hf:"):
        return [_hub(text)]
    parts = _parts(text)
    if len(parts) != 1 or parts[0] != text:
        return [source for part in parts for source in resolve(part)]
    path, column = _split_column(text)
    if path.is_dir() and not any((path / name).exists() for name in _SAVED):
        return _folder(path, column)
    if path.exists():
        return [Source(text, path, column)]
    if any(sign in text for sign in "*?["):
        return _matches(path, column)
    raise DataError(
        f"data must be a file, a folder, a comma list or pattern of files, or hf:NAME, got {text!r}, which does not "
        f"exist. {_neighbour(path)}"
    )


def absolute(data: str) -> str:
    """``data`` with every path in it made absolute, so that it means the same from another folder.

    Example:
        >>> absolute("hf:NAME"), absolute("/a.fasta, /b.fasta,"), absolute("  ")
        ('hf:NAME', '/a.fasta,/b.fasta', '')
    """
    text = data.strip()
    if not text or text.startswith("hf:"):
        return text
    return ",".join(
        part if part.startswith("hf:") else str(Path(part).expanduser().absolute()) for part in _parts(text)
    )


def _parts(text: str) -> list[str]:
    """What the commas of a list separate; a file may have a comma in its name, too."""
    if "," not in text or Path(text).expanduser().exists():
        return [text]
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise DataError(f"data must name a file between its commas, got {text!r}. Name one, or none for the sample.")
    return parts


def _hub(text: str) -> Source:
    name, _, rest = text.removeprefix("hf:").partition(":")
    split, _, column = rest.partition(":")
    if not name:
        raise DataError(f"data must be hf:NAME or hf:NAME:SPLIT, got {text!r}. Name a data set.")
    return Source(text, column=column, hub=name, split=split)


def _split_column(text: str) -> tuple[Path, str]:
    whole = Path(text).expanduser()
    before, colon, column = text.rpartition(":")
    if whole.exists() or not (colon and before and "/" not in column):
        return whole, ""
    return Path(before).expanduser(), column


def _folder(folder: Path, column: str) -> list[Source]:
    try:
        found = sorted(path for path in folder.iterdir() if _is_protein_file(path))
    except OSError as error:
        raise DataError(
            f"data must be a readable folder, got {str(folder)!r}: {error.strerror}. Check permissions."
        ) from error
    if not found:
        raise DataError(
            f"data must be a folder with protein files ({', '.join(_SUFFIXES)}, also .gz), got {str(folder)!r} "
            "without any. Name the files, or another folder."
        )
    return [Source(str(path), path, column) for path in found]


def _is_protein_file(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz")
    return not name.startswith(".") and name.endswith(_SUFFIXES) and path.is_file()


def _matches(pattern: Path, column: str) -> list[Source]:
    root = Path(pattern.anchor) if pattern.anchor else Path()
    found = sorted(path for path in root.glob(str(pattern.relative_to(pattern.anchor))) if path.is_file())
    if not found:
        raise DataError(f"data must match at least one file, got none for {str(pattern)!r}. Check the pattern.")
    return [Source(str(path), path, column) for path in found]


def _neighbour(path: Path) -> str:
    """The nearest name beside a missing file, as a remedy."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"The folder {str(path.parent)!r} cannot be read either: check the path."
    hint = nearest(path.name, names)
    return hint if hint.startswith("Did") else "Check the path."


def read(source: Source) -> Iterable[RawProtein]:
    """The raw records of ``source``.

    Raises:
        DataError: It cannot be read, or is not what it must be.
        MissingExtraError: It needs a package that is not installed.
    """
    if source.hub:
        return read_hub(source.hub, source.text, source.split, source.column)
    if source.path is not None and source.path.is_dir():
        return read_saved(source.path, source.text, column=source.column)
    content = _content(source)
    is_parquet = content.startswith(_PARQUET) or source.text.lower().partition(":")[0].endswith(".parquet")
    if source.path is not None and is_parquet:
        return read_parquet(source.path, source.text, source.column)
    text = _text(content, source.text)
    if not text.strip():
        raise DataError(f"{source.text} must hold proteins, got an empty file. Name another file.")
    is_table = bool(source.column) or _is_table(source.path)
    if is_table and not text.lstrip("\ufeff \t\r\n").startswith(">"):
        return read_csv(text, source.text, source.column)
    return parse_fasta(text, source.text)


def _is_table(path: Path | None) -> bool:
    return path is not None and path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))


def _content(source: Source) -> bytes:
    try:
        if source.path is None:
            return files("sfl.esm2").joinpath("bundled", BUNDLED).read_bytes()
        return source.path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{source.text} must be a readable file, got: {error.strerror}. Check the path and its permissions."
        ) from error


def _text(content: bytes, name: str) -> str:
    try:
        plain = gzip.decompress(content) if content.startswith(_GZIP) else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{name} must be whole gzip data, got a file that is cut off or damaged: {error}. Fetch or pack it again."
        ) from error
    try:
        text = plain.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} must be UTF-8 text or gzip of it, got byte 0x{plain[error.start]:02x} at offset {error.start}. "
            "Name a FASTA, CSV or Parquet file; unpack other archives first."
        ) from error
    if "\0" in text:
        raise DataError(f"{name} must be text, got binary data with NUL bytes. Name a FASTA, CSV or Parquet file.")
    return text
