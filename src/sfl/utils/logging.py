"""Logging of SFL on the standard library's ``logging``: rich, plain or JSON lines on stderr."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path

from sfl.errors import ConfigError
from sfl.types import LogFormat

__all__ = ["JsonFormatter", "setup_logging"]

_NAME = "sfl"
_PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, ISO 8601), level, logger, message, and whatever ``extra`` carried."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD and key not in line}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _CurrentStderr:
    """Whatever ``sys.stderr`` is now, so that a live progress bar may stand in for it while it is on the screen."""

    @property
    def encoding(self) -> str:
        return getattr(sys.stderr, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()


def setup_logging(
    format: LogFormat = "rich",
    verbose: bool = False,
    file: str | Path | None = None,
) -> logging.Logger:
    """Says on stderr, and in ``file`` if one is named, what the ``sfl`` loggers say.

    Only the logger ``"sfl"`` is touched, never the root logger of a host application. Calling it again replaces what
    the last call set up. Without a call SFL is silent below warnings, as a library should be.

    Args:
        format: ``"rich"`` (colours on a terminal), ``"simple"`` (plain lines) or ``"json"`` (one object a line).
        verbose: Also say debug messages.
        file: A file that receives every message, debug ones included, appended; JSON lines when ``format`` is json.

    Returns:
        The logger ``"sfl"``.

    Raises:
        ConfigError: ``format`` is none of the three, or ``file`` cannot be opened.
    """
    if format not in ("rich", "simple", "json"):
        raise ConfigError(f"logging.format must be rich, simple or json, got {format!r}.")
    handlers = [_stderr_handler(format, verbose)]
    if file is not None:
        handlers.append(_file_handler(Path(file), format))
    logger = logging.getLogger(_NAME)
    for old in [handler for handler in logger.handlers if handler.get_name() == _NAME]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.set_name(_NAME)
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose or file is not None else logging.INFO)
    return logger


def _stderr_handler(format: LogFormat, verbose: bool) -> logging.Handler:
    handler = _rich_handler(verbose) if format == "rich" else logging.StreamHandler(_CurrentStderr())
    if format != "rich":
        handler.setFormatter(_line_formatter(format))
    handler.setLevel(logging.DEBUG if verbose else logging.INFO)
    return handler


def _rich_handler(verbose: bool) -> logging.Handler:
    from typing import TextIO, cast

    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(file=cast(TextIO, _CurrentStderr()))
    return RichHandler(console=console, show_path=verbose, log_time_format="[%X]", rich_tracebacks=verbose)


def _file_handler(path: Path, format: LogFormat) -> logging.Handler:
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"logging file must be writable, got {path}: {error.strerror}. Name another file.") from error
    handler.setFormatter(_line_formatter(format))
    return handler


def _line_formatter(format: LogFormat) -> logging.Formatter:
    return JsonFormatter() if format == "json" else logging.Formatter(_PLAIN)
