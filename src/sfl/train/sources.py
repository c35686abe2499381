"""What ``--data`` may say, and the content of its files, whatever they are called."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sfl.errors import DataError, nearest

__all__ = ["Shelf", "Source", "absolute", "content", "is_parquet", "is_table", "names_of_sites", "resolve", "text_of"]

_SAVED = ("state.json", "dataset_dict.json")
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """What an application's data may be.

    Attributes:
        what: What a file holds, as a word before "file": protein, text.
        kinds: What to name instead of a file that is none, as in "Name a FASTA, CSV or Parquet file".
        suffixes: Endings of its files, looked for in a folder; each may be followed by .gz.
        package: Package whose ``bundled`` folder holds the sample.
        bundled: File of the sample.
    """

    what: str
    kinds: str
    suffixes: tuple[str, ...]
    package: str
    bundled: str


@dataclass(frozen=True)
class Source:
    """One file, saved data set or hub data set.

    Attributes:
        shelf: What it may be.
        text: How messages call it.
        path: Where it is; None for the bundled sample and for the hub.
        column: The column that is wanted, for tables; empty to look for one.
        hub: Name on the hub; empty for what is on disk.
        split: Split of a hub data set.
    """

    shelf: Shelf
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
        for suffix in (*self.shelf.suffixes, ".txt"):
            stem = stem.removesuffix(suffix)
        return stem or name


def resolve(data: str, shelf: Shelf) -> list[Source]:
    """The sources that ``data`` names, in an order that no file system decides.

    ========================  ================================================================
    ``data``                  sources
    ========================  ================================================================
    (empty)                   the bundled sample
    ``hf:NAME[:SPLIT[:COL]]`` a data set on the Hugging Face hub
    ``PATH[:COLUMN]``         a file of the shelf, or a saved data set
    ``FOLDER[:COLUMN]``       its files of the shelf, by name
    ``a.fasta,b.fasta``       those, in that order
    ``sites/*.fasta``         what matches, by name
    ========================  ================================================================

    Raises:
        DataError: Something is missing, or a folder or pattern has no such file.
    """
    text = data.strip()
    if not text:
        return [Source(shelf, shelf.bundled)]
    if text.startswith("hf:"):
        return [_hub(text, shelf)]
    parts = _parts(text)
    if len(parts) != 1 or parts[0] != text:
        return [source for part in parts for source in resolve(part, shelf)]
    path, column = _split_column(text)
    if path.is_dir() and not any((path / name).exists() for name in _SAVED):
        return _folder(path, column, shelf)
    if path.exists():
        return [Source(shelf, text, path, column)]
    if any(sign in text for sign in "*?["):
        return _matches(path, column, shelf)
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


def _hub(text: str, shelf: Shelf) -> Source:
    name, _, rest = text.removeprefix("hf:").partition(":")
    split, _, column = rest.partition(":")
    if not name:
        raise DataError(f"data must be hf:NAME or hf:NAME:SPLIT, got {text!r}. Name a data set.")
    return Source(shelf, text, column=column, hub=name, split=split)


def _split_column(text: str) -> tuple[Path, str]:
    whole = Path(text).expanduser()
    before, colon, column = text.rpartition(":")
    if whole.exists() or not (colon and before and "/" not in column):
        return whole, ""
    return Path(before).expanduser(), column


def _folder(folder: Path, column: str, shelf: Shelf) -> list[Source]:
    try:
        found = sorted(path for path in folder.iterdir() if _is_file(path, shelf))
    except OSError as error:
        raise DataError(
            f"data must be a readable folder, got {str(folder)!r}: {error.strerror}. Check permissions."
        ) from error
    if not found:
        raise DataError(
            f"data must be a folder with {shelf.what} files ({', '.join(shelf.suffixes)}, also .gz), got "
            f"{str(folder)!r} without any. Name the files, or another folder."
        )
    return [Source(shelf, str(path), path, column) for path in found]


def _is_file(path: Path, shelf: Shelf) -> bool:
    name = path.name.lower().removesuffix(".gz")
    return not name.startswith(".") and name.endswith(shelf.suffixes) and path.is_file()


def _matches(pattern: Path, column: str, shelf: Shelf) -> list[Source]:
    root = Path(pattern.anchor) if pattern.anchor else Path()
    found = sorted(path for path in root.glob(str(pattern.relative_to(pattern.anchor))) if path.is_file())
    if not found:
        raise DataError(f"data must match at least one file, got none for {str(pattern)!r}. Check the pattern.")
    return [Source(shelf, str(path), path, column) for path in found]


def _neighbour(path: Path) -> str:
    """The nearest name beside a missing file, as a remedy."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"The folder {str(path.parent)!r} cannot be read either: check the path."
    hint = nearest(path.name, names)
    return hint if hint.startswith("Did") else "Check the path."


def content(source: Source) -> bytes:
    """The bytes of a file, or of the sample.

    Raises:
        DataError: It cannot be read.
    """
    try:
        if source.path is None:
            return files(source.shelf.package).joinpath("bundled", source.shelf.bundled).read_bytes()
        return source.path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{source.text} must be a readable file, got: {error.strerror}. Check the path and its permissions."
        ) from error


def is_parquet(source: Source, found: bytes) -> bool:
    """Whether a file says that it is one, or is called so."""
    return source.path is not None and (
        found.startswith(_PARQUET) or source.text.lower().partition(":")[0].endswith(".parquet")
    )


def is_table(source: Source, *suffixes: str) -> bool:
    """Whether a file is called as a table is, or a column of it is named."""
    name = "" if source.path is None else source.path.name.lower().removesuffix(".gz")
    return bool(source.column) or name.endswith(suffixes)


def text_of(source: Source, found: bytes) -> str:
    """A file's content as text: UTF-8, or gzip of it, told by the content.

    Raises:
        DataError: It is not, or there is none.
    """
    name, kinds = source.text, source.shelf.kinds
    try:
        plain = gzip.decompress(found) if found.startswith(_GZIP) else found
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{name} must be whole gzip data, got a file that is cut off or damaged: {error}. Fetch or pack it again."
        ) from error
    try:
        text = plain.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} must be UTF-8 text or gzip of it, got byte 0x{plain[error.start]:02x} at offset {error.start}. "
            f"Name {kinds}; unpack other archives first."
        ) from error
    if "\0" in text:
        raise DataError(f"{name} must be text, got binary data with NUL bytes. Name {kinds}.")
    if not text.strip():
        raise DataError(f"{name} must hold {source.shelf.what}s, got an empty file. Name another file.")
    return text


def names_of_sites(sources: Sequence[Source]) -> list[str]:
    """A name for the site of each file: the file's own, with a number where another has it."""
    names: list[str] = []
    for source in sources:
        name, number = source.name, 2
        while name in names:
            name, number = f"{source.name}-{number}", number + 1
        names.append(name)
    return names
