"""The privacy ledger: append-only, hash-chained, written before anything leaves.

``charge`` appends events and flushes them to disk *before* the exchange that spends them. A crash between the two
over-counts, never under-counts; an exchange that is repeated after a resume is charged again, because the first one
may have left. What was last written is remembered outside the ledger's folder, too (``sfl.privacy.anchor``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from sfl.core.mechanism import DpEvent
from sfl.errors import ConfigError, LedgerError
from sfl.privacy.anchor import check_anchor, ledgers_folder, note_anchor

Budget: TypeAlias = Callable[[Sequence[DpEvent], Sequence[Sequence[DpEvent]]], None]
"""Raises ``BudgetExhausted`` if a run's events, with those of each earlier run, pass the budget."""

_GENESIS = "0" * 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: what ``run`` spent for ``round``."""

    run: str
    round: int
    event: DpEvent


class PrivacyLedger:
    """All that a run has spent, in order; or all that was spent on one data set, by many runs.

    Args:
        path: The ledger's file, or ``None`` for a run that leaves nothing behind.
        budget: Asked before each charge.
        dataset: The ledger of the data set that the run is about, charged first.
        identity: Who it is; by default a new one, or the one in its file.

    Raises:
        LedgerError: If the file was edited, torn, or an older copy was put back.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        budget: Budget | None = None,
        dataset: PrivacyLedger | None = None,
        identity: str = "",
    ) -> None:
        self.path, self.dataset = path, dataset
        self.id = identity or uuid.uuid4().hex
        self.entries: list[Entry] = []
        self._budget = budget
        self._hashes: list[str] = []
        if path is not None and path.exists():
            self._read(path)
        elif path is not None:
            check_anchor(self.id, [], path)  # only a ledger that was there before is remembered

    @property
    def events(self) -> list[DpEvent]:
        """What was spent, in order."""
        return [entry.event for entry in self.entries]

    def earlier(self) -> list[list[DpEvent]]:
        """What other runs have spent on the same data set, each by itself; nothing if no data set is named."""
        runs: dict[str, list[DpEvent]] = {}
        for entry in self.dataset.entries if self.dataset is not None else ():
            if entry.run != self.id:
                runs.setdefault(entry.run, []).append(entry.event)
        return list(runs.values())

    def must_cover(self, rounds: int) -> None:
        """Check that every round up to ``rounds`` was charged: a run that goes on brings its ledger along.

        Raises:
            LedgerError: If the ledger was lost or cut short.
        """
        missing = sorted(set(range(1, rounds + 1)) - {entry.round for entry in self.entries})
        if missing:
            raise LedgerError(
                f"{self.path} must hold what rounds 1 to {rounds} spent, got none of {missing}. {_REMEDY}"
            )

    def charge(self, round: int, *events: DpEvent) -> None:
        """Spend ``events`` for ``round``. Returns only when they are on disk.

        Raises:
            BudgetExhausted: If they would pass the budget; nothing is written then.
            LedgerError: If they cannot be written.
        """
        if not events:
            return
        with ExitStack() as held:
            for ledger in (self.dataset, self):
                if ledger is not None:
                    held.enter_context(ledger.locked())
            self._charge(round, events)

    def _charge(self, round: int, events: Sequence[DpEvent]) -> None:
        if self._budget is not None:
            self._budget([*self.events, *events], self.earlier())
        entries = [Entry(self.id, round, event) for event in events]
        if self.dataset is not None:
            self.dataset.append(entries)
        self.append(entries)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Alone with the file, after reading what others have written to it meanwhile: runs on the same data, or the
        same run, that somebody has resumed twice.
        """
        if self.path is None:
            yield
            return
        try:
            own = self.path.parent == ledgers_folder()  # the user's alone; a run's folder may be shared
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if own else 0o777)
            file = self.path.open("a")
        except OSError as error:
            raise LedgerError(f"{self.path} must be writable before anything is sent, got: {error}.") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._read(self.path)
            yield

    def append(self, entries: Sequence[Entry]) -> None:
        """Write entries without asking the budget.

        Raises:
            LedgerError: If they cannot be written.
        """
        if not entries:
            return
        lines, hashes = [], list(self._hashes)
        if not hashes:
            _add_line(lines, hashes, {"ledger": self.id})
        for entry in entries:
            _add_line(lines, hashes, {"run": entry.run, "round": entry.round, "event": asdict(entry.event)})
        if self.path is not None:
            _write(self.path, "".join(lines), new=not self._hashes)
            note_anchor(self.id, len(hashes), hashes[-1])
        self._hashes = hashes
        self.entries += entries

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise LedgerError(f"{path} must be a readable ledger, got: {error}. {_REMEDY}") from error
        if text and not text.endswith("\n"):
            raise LedgerError(f"{path} must end with a whole line, and does not. {_REMEDY}")
        self._hashes, self.entries = [], []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                body: dict[str, Any] = json.loads(line)
                digest = body.pop("hash")
                if number == 1:
                    self.id = _identity(body["ledger"])
                else:
                    self.entries.append(Entry(str(body["run"]), int(body["round"]), DpEvent(**body["event"])))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise LedgerError(f"{path} line {number} must be a ledger entry, got: {error}. {_REMEDY}") from error
            if digest != _hash(self._hashes, body):
                raise LedgerError(f"{path} line {number} must continue the hash chain, and does not. {_REMEDY}")
            self._hashes.append(digest)
        check_anchor(self.id, self._hashes, path)


def dataset_ledger(name: str) -> PrivacyLedger | None:
    """The ledger of a data set, by the name that its users have agreed on; ``None`` for the empty name.

    Raises:
        ConfigError: If the name cannot be that of a file.
        LedgerError: If the ledger was edited, torn, or an older copy was put back.
    """
    if not name:
        return None
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.@_-]{0,127}", name):  # with a site's name
        raise ConfigError(f"a data set's name must be of letters, digits, dots, dashes and underscores, got {name!r}.")
    identity = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    return PrivacyLedger(ledgers_folder() / f"{name}.jsonl", identity=identity)


_REMEDY = "The ledger was edited or torn; what was spent can no longer be proven, so the run is refused."


def _identity(value: object) -> str:
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value)):
        raise ValueError(f"no ledger's identity: {value!r}")
    return value


def _add_line(lines: list[str], hashes: list[str], body: dict[str, Any]) -> None:
    digest = _hash(hashes, body)
    lines.append(json.dumps({**body, "hash": digest}) + "\n")
    hashes.append(digest)


def _hash(hashes: Sequence[str], body: dict[str, Any]) -> str:
    """Of a line, its number and the line before."""
    chained = {**body, "index": len(hashes), "previous": hashes[-1] if hashes else _GENESIS}
    return hashlib.sha256(json.dumps(chained, sort_keys=True).encode()).hexdigest()


def _write(path: Path, text: str, *, new: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if new:
            _sync_folder(path.parent)
    except OSError as error:
        raise LedgerError(f"{path} must be writable before anything is sent, got: {error}.") from error


def _sync_folder(folder: Path) -> None:
    """A new file is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
