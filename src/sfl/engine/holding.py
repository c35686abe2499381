"""What a process of sites holds of tasks and replies that travel in pieces: the site's side of ``engine/freight``."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any, TypeAlias

from sfl.core import arrays as core
from sfl.engine.pieces import Source, Target, of_piece
from sfl.engine.wire import FORMAT
from sfl.errors import EngineError
from sfl.types import Array, Parameters

Said: TypeAlias = dict[str, Any]
"""What the text of a message says."""


class Holding:
    """Arrays of tasks that have come so far, and those of replies that have not been drawn.

    Sites of one process share what was sent to all of them. What belongs to an earlier life of the server, or to an
    exchange that it has done with, is let go.

    Args:
        alone: Whether there is one site alone: then a task's arrays are let go with the task.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self._alone, self._lock = alone, threading.RLock()
        self._life = ""
        self._loaded: dict[int, Target] = {}  # by exchange
        self._kept: dict[tuple[int, str], tuple[Source, dict[int, int]]] = {}  # and site; and what of it was drawn
        self._lent: tuple[int, str] | None = None  # the reply whose arrays may still be its client's

    def passed(self, site: str, said: Said, arrays: Mapping[str, Array]) -> tuple[str, Parameters] | None:
        """The answer to a message that loads or draws a piece; ``None`` if it is a task.

        Raises:
            EngineError: If it cannot be loaded or drawn.
        """
        try:
            with self._lock:
                self._let_go(said)
                if "load" in said:
                    return self._load(site, said, arrays)
                return self._draw(site, said) if "draw" in said else None
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{site}: a piece must fit what it is of, got: {error!r}.") from error

    def parameters(self, site: str, said: Said, arrays: Parameters) -> Parameters:
        """The arrays of a task: those that were loaded, or those that came with it.

        Raises:
            EngineError: If they have not all come.
        """
        if "held" not in said:
            return arrays
        exchange = int(said["exchange"])
        with self._lock:
            loaded = self._loaded.pop(exchange, None) if self._alone else self._loaded.get(exchange)
        if loaded is None:
            raise EngineError(f"{site}: its process has lost the task's arrays; it starts anew with the next task.")
        try:
            return loaded.arrays(said["held"])
        except ValueError as error:
            raise EngineError(f"{site}: {error}") from error

    def before_work(self) -> None:
        """Make what is kept its own: the next task may overwrite what a client has lent."""
        with self._lock:
            if self._lent is not None and self._lent in self._kept:
                source, drawn = self._kept[self._lent]
                self._kept[self._lent] = source.own(), drawn
            self._lent = None

    def kept(self, site: str, said: Said, text: str, delta: Parameters) -> tuple[str, Parameters]:
        """A reply as it leaves: whole, or, if it is larger than the task allows for, without its arrays."""
        if not delta or core.nbytes(delta) <= int(said.get("above", core.nbytes(delta))):
            return text, delta
        source, key = Source(delta), (int(said["exchange"]), site)
        with self._lock:
            self._kept[key], self._lent = (source, {}), key
        return json.dumps({**json.loads(text), "held": source.said}), {}

    def _let_go(self, said: Said) -> None:
        life, oldest = str(said.get("life", "")), int(said.get("oldest", 0))
        if life != self._life:
            self._life, oldest = life, 1 << 62
        self._loaded = {exchange: kept for exchange, kept in self._loaded.items() if exchange >= oldest}
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] >= oldest}

    def _load(self, site: str, said: Said, arrays: Mapping[str, Array]) -> tuple[str, Parameters]:
        exchange, (start, nbytes) = int(said["exchange"]), said["load"]
        target = self._loaded.get(exchange)
        if target is None:
            target = self._loaded[exchange] = Target(int(nbytes))
        target.write(int(start), of_piece(arrays))
        return _answer(site, exchange, start), {}

    def _draw(self, site: str, said: Said) -> tuple[str, Parameters]:
        exchange, (start, stop) = int(said["exchange"]), map(int, said["draw"])
        source, drawn = self._kept[exchange, site]
        if not 0 <= start < stop <= source.nbytes:
            raise ValueError(f"{start} to {stop} of {source.nbytes} bytes")
        piece = source.read(start, stop)
        drawn[start] = stop - start
        if sum(drawn.values()) >= source.nbytes:
            del self._kept[exchange, site]
        return _answer(site, exchange, start), piece


def _answer(site: str, exchange: int, start: object) -> str:
    return json.dumps({"format": FORMAT, "site": site, "exchange": exchange, "at": start})
