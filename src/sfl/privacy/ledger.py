"""The privacy ledger: append-only, hash-chained, written before anything leaves.

``charge`` appends an event and flushes it to disk *before* the exchange that spends it. A crash between the two
over-counts, never under-counts; an exchange that is repeated after a resume is charged again, because the first one
may have left.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from sfl.core.mechanism import DpEvent
from sfl.errors import LedgerError

Budget: TypeAlias = Callable[[Sequence[DpEvent]], None]
"""Raises ``BudgetExhausted`` if these events together pass the budget."""

_GENESIS = "0" * 64


class Ledger:
    """All that a run has spent, in order.

    Args:
        path: The ledger's file, or ``None`` for a run that leaves nothing behind.
        budget: Asked before each charge.

    Raises:
        LedgerError: If the file was edited or torn.
    """

    def __init__(self, path: Path | None = None, *, budget: Budget | None = None) -> None:
        self.path = path
        self.events: list[DpEvent] = []
        self._budget = budget
        self._last = _GENESIS
        self._rounds: set[int] = set()
        if path is not None and path.exists():
            self._read(path)

    def must_cover(self, rounds: int) -> None:
        """Check that every round up to ``rounds`` was charged: a run that goes on brings its ledger along.

        Raises:
            LedgerError: If the ledger was lost or cut short.
        """
        missing = sorted(set(range(1, rounds + 1)) - self._rounds)
        if missing:
            raise LedgerError(
                f"{self.path} must hold what rounds 1 to {rounds} spent, got none of {missing}. {_REMEDY}"
            )

    def charge(self, round: int, event: DpEvent) -> None:
        """Spend ``event`` for ``round``. Returns only when it is on disk.

        Raises:
            BudgetExhausted: If it would pass the budget; nothing is written then.
            LedgerError: If it cannot be written.
        """
        if self._budget is not None:
            self._budget([*self.events, event])
        entry = {"index": len(self.events), "round": round, "event": asdict(event), "previous": self._last}
        digest = _hash(entry)
        if self.path is not None:
            self._append(self.path, json.dumps({**entry, "hash": digest}) + "\n")
        self._accept(round, event, digest)

    def _accept(self, round: int, event: DpEvent, digest: str) -> None:
        self.events.append(event)
        self._rounds.add(round)
        self._last = digest

    def _append(self, path: Path, line: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if not self.events:
                _sync_folder(path.parent)
        except OSError as error:
            raise LedgerError(f"{path} must be writable before anything is sent, got: {error}.") from error

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise LedgerError(f"{path} must be a readable ledger, got: {error}. {_REMEDY}") from error
        if text and not text.endswith("\n"):
            raise LedgerError(f"{path} must end with a whole line, and does not. {_REMEDY}")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                entry: dict[str, Any] = json.loads(line)
                digest = entry.pop("hash")
                event = DpEvent(**entry["event"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise LedgerError(f"{path} line {number} must be a ledger entry, got: {error}. {_REMEDY}") from error
            if entry.get("previous") != self._last or entry.get("index") != number - 1 or digest != _hash(entry):
                raise LedgerError(f"{path} line {number} must continue the hash chain, and does not. {_REMEDY}")
            self._accept(entry["round"], event, digest)


_REMEDY = "The ledger was edited or torn; what was spent can no longer be proven, so the run is refused."


def _sync_folder(folder: Path) -> None:
    """A new file is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
