"""What ledgers were, remembered outside their folders: a ledger that is rolled back or forged does not fit it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from sfl.errors import LedgerError
from sfl.utils.cache import user_cache

__all__ = ["check_anchor", "ledgers_folder", "note_anchor"]

_LOG = logging.getLogger("sfl.privacy")


def ledgers_folder() -> Path:
    """In the user's cache: ``$XDG_CACHE_HOME/sfl/ledgers``."""
    return user_cache() / "ledgers"


def check_anchor(ledger: str, hashes: Sequence[str], path: Path) -> None:
    """A ledger must go on from what was last seen of it here. One that was never seen here passes.

    Args:
        ledger: Its identity.
        hashes: The hashes of its lines, in order.
        path: Where it lies, for the error.

    Raises:
        LedgerError: If it is shorter than it was, or another one.
    """
    try:
        text = _anchor(ledger).read_text(encoding="utf-8")
    except OSError:
        return
    try:
        seen = json.loads(text)
        lines, head = int(seen["lines"]), str(seen["hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{_anchor(ledger)} must say what a ledger was, got {text!r:.60}.") from error
    if len(hashes) < lines or hashes[lines - 1] != head:
        raise LedgerError(
            f"{path} must hold the {lines} lines that were written to it, got {len(hashes)} or others. "
            "An older copy was put back, or it was edited; what was spent can no longer be proven, so the run is "
            "refused."
        )


def note_anchor(ledger: str, lines: int, head: str) -> None:
    """Remember a ledger's length and last hash; whole, also if the machine stops meanwhile."""
    target = _anchor(ledger)
    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with part.open("w", encoding="utf-8") as file:
            json.dump({"lines": lines, "hash": head}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        _LOG.warning("a ledger that is rolled back will not be noticed: %s cannot be written (%s)", target, error)


def _anchor(ledger: str) -> Path:
    return ledgers_folder() / "anchors" / f"{ledger}.json"
