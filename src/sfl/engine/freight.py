"""Large arrays on their way over an engine of messages: the server's side of ``engine/holding``.

A task's arrays are loaded into its site's process piece by piece; then the task itself goes there. A reply says what it
holds; the server draws it when its turn comes, so until then it takes no memory here, nor in the engine's broker.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from sfl.core.events import TransferProgress
from sfl.core.task import FIT, Reply, Status, Task
from sfl.engine import pieces
from sfl.engine.base import late
from sfl.engine.pieces import Source, Target, layout_of, of_piece, spans
from sfl.engine.wire import FORMAT, read_answer
from sfl.types import Array, Parameters
from sfl.utils.memory import trim

Key: TypeAlias = Hashable
Post: TypeAlias = Callable[[str, str, Parameters], Key]
"""Sends a text and arrays to a site; by what its answer will be known. A ``ValueError`` says why it cannot."""
PATIENCE = 600.0
"""Seconds that one piece of a reply may take, where a round has no limit of its own."""
_AHEAD = 2  # messages with pieces on their way to or from one site at a time
_LONG, _MOST_JOINED = 0.3, 4  # seconds for an answer after which a message carries twice as many pieces, and at most
_WIDER = 16  # times what was sent: an update of wider numbers, beside a model that was sent in narrow ones
_SHOWN, _PAUSE = 100_000_000, 1.0  # bytes from which a transfer is shown; seconds between two words of it


@dataclass(frozen=True, slots=True)
class Ready:
    """All of a task's arrays have come to its site: now the task may go, with this text."""

    ticket: int
    site: str
    text: str


@dataclass(slots=True, eq=False)
class _Transfer:
    ticket: int
    site: str
    text: str
    direction: str
    nbytes: int
    todo: deque[tuple[int, int]]
    source: Source | None = None
    target: Target | None = None
    under_way: dict[Key, tuple[int, int, float]] = field(default_factory=dict[Key, tuple[int, int, float]])
    done: int = 0
    joined: int = 1


class Freight:
    """What is on its way in pieces.

    Args:
        post: Sends a message.
        life: Of this server.
        oldest: The oldest exchange of which something is still expected: sites let go of what is older.
    """

    def __init__(self, post: Post, life: str, oldest: Callable[[], int]) -> None:
        self._post, self._life, self._oldest = post, life, oldest
        self._by_key: dict[Key, _Transfer] = {}
        self._drawn: dict[tuple[int, str], Reply] = {}
        self._said: dict[tuple[int, str], str] = {}  # texts of replies that wait to be drawn
        self._most: dict[int, int] = {}  # by ticket, bytes that a reply may hold
        self._listen: Callable[[TransferProgress], object] | None = None
        self._told = 0.0

    def tell(self, listener: Callable[[TransferProgress], object]) -> None:
        """Call this as transfers go on."""
        self._listen = listener

    @staticmethod
    def is_large(arrays: Mapping[str, Array]) -> bool:
        """Whether arrays are too large for one message."""
        return sum(value.nbytes for value in arrays.values()) > pieces.ABOVE

    @property
    def keys(self) -> list[Key]:
        """Messages that wait for an answer."""
        return list(self._by_key)

    def loading(self) -> set[str]:
        """Sites whose task's arrays are on their way."""
        return {transfer.site for transfer in self._by_key.values() if transfer.source is not None}

    def tickets(self) -> set[int]:
        """Exchanges of which something is on its way, or waits to be drawn."""
        return {transfer.ticket for transfer in self._by_key.values()} | {ticket for ticket, _ in self._said}

    def loads(self, ticket: int | None) -> bool:
        """Whether tasks of a ticket are being loaded."""
        return any(
            transfer.source is not None and ticket in (None, transfer.ticket) for transfer in self._by_key.values()
        )

    def undrawn(self, ticket: int) -> int:
        """How many replies to a ticket wait to be drawn."""
        return sum(number == ticket for number, _ in self._said)

    def text(self, text: str, task: Task, ticket: int) -> str:
        """A task's text, with what its site must know of pieces."""
        if task.name == FIT:
            self._most[ticket] = _WIDER * sum(value.nbytes for value in task.parameters.values()) + pieces.ABOVE
        return json.dumps({**json.loads(text), "above": pieces.ABOVE, "oldest": min(ticket, self._oldest())})

    def load(self, ticket: int, site: str, text: str, arrays: Parameters) -> Reply | None:
        """Begin to load a task's arrays into its site's process; the reply of a site that cannot be reached."""
        source = Source(arrays)
        held = json.dumps({**json.loads(text), "held": source.said})
        todo = deque(spans(source.nbytes, pieces.SIZE))
        transfer = _Transfer(ticket, site, held, "down", source.nbytes, todo, source=source)
        try:
            self._go_on(transfer)
        except ValueError as error:
            return self._failed(transfer, str(error))
        return None

    def noted(self, ticket: int, site: str, text: str) -> Reply | None:
        """What stands for a reply whose arrays lie at its site, to be drawn; ``None`` if it is whole."""
        try:
            is_held = '"held"' in text and "held" in json.loads(text)
        except (ValueError, TypeError):
            return None
        if not is_held:
            return None
        self._said[ticket, site] = text
        return Reply(site, Status.USED, ticket=ticket)

    def whole(self, reply: Reply, pump: Callable[[], bool], timeout: float | None) -> Reply:
        """The whole of a reply that was noted, drawn now; another one as it is.

        Args:
            reply: What has arrived.
            pump: Lets answers to messages of this freight come, and waits a little; whether one has.
            timeout: Seconds that a piece may take.
        """
        key, limit = (reply.ticket, reply.site), PATIENCE if timeout is None else timeout
        text = self._said.pop(key, None)
        if text is None:
            return reply
        trim()
        self._draw(*key, text)
        deadline = time.monotonic() + limit
        while key not in self._drawn:
            if pump():
                deadline = time.monotonic() + limit
            elif time.monotonic() > deadline:
                self._by_key = {sent: one for sent, one in self._by_key.items() if (one.ticket, one.site) != key}
                return replace(late(reply.site, timeout), ticket=reply.ticket)
        return replace(self._drawn.pop(key), ticket=reply.ticket)

    def _draw(self, ticket: int, site: str, text: str) -> None:
        try:
            nbytes = layout_of(json.loads(text)["held"]).nbytes
            most = self._most.get(ticket)
            if most is not None and nbytes > most:
                raise ValueError(f"a reply must hold at most {most} bytes, got {nbytes}")
            todo = deque(spans(nbytes, pieces.SIZE))
            self._go_on(_Transfer(ticket, site, text, "up", nbytes, todo, target=Target(nbytes)))
        except ValueError as error:
            self._drawn[ticket, site] = _rejected(ticket, site, str(error))

    def came(self, key: Key, answer: tuple[str, Parameters] | str) -> Ready | Reply | None:
        """What follows from an answer to a message of this freight, or from the word that there will be none.

        Returns:
            That a task may go, or the reply of a site that has failed; ``None`` if the transfer goes on or was a draw.
        """
        transfer = self._by_key.pop(key, None)
        if transfer is None:
            return None
        start, stop, sent = transfer.under_way.pop(key)
        if time.monotonic() - sent > _LONG:
            transfer.joined = min(2 * transfer.joined, _MOST_JOINED)
        try:
            arrays = _accepted(answer, transfer, start)
            if transfer.target is not None:
                piece = of_piece(arrays)
                if piece.size != stop - start:
                    raise ValueError(f"a piece must have {stop - start} bytes, got {piece.size}")
                transfer.target.write(start, piece)
            transfer.done += stop - start
            self._say(transfer)
            self._go_on(transfer)
        except ValueError as error:
            return self._failed(transfer, str(error))
        return self._ended(transfer) if transfer.done >= transfer.nbytes else None

    def cancel(self, ticket: int) -> None:
        """Forget what is on its way of a ticket."""
        self._by_key = {key: transfer for key, transfer in self._by_key.items() if transfer.ticket != ticket}
        self._said = {key: text for key, text in self._said.items() if key[0] != ticket}
        self._drawn = {key: reply for key, reply in self._drawn.items() if key[0] != ticket}
        self._most.pop(ticket, None)

    def _go_on(self, transfer: _Transfer) -> None:
        while transfer.todo and len(transfer.under_way) < _AHEAD:
            together = [transfer.todo.popleft() for _ in range(min(transfer.joined, len(transfer.todo)))]
            start, stop = together[0][0], together[-1][1]
            what = {"load": [start, transfer.nbytes]} if transfer.source is not None else {"draw": [start, stop]}
            said = {"format": FORMAT, "exchange": transfer.ticket, "life": self._life}
            said["oldest"] = min(transfer.ticket, self._oldest())
            arrays: Parameters = {} if transfer.source is None else transfer.source.read(start, stop)
            key = self._post(transfer.site, json.dumps({**said, **what}), arrays)
            self._by_key[key] = transfer
            transfer.under_way[key] = (start, stop, time.monotonic())

    def _ended(self, transfer: _Transfer) -> Ready | None:
        if transfer.target is None:
            return Ready(transfer.ticket, transfer.site, transfer.text)
        try:
            arrays = transfer.target.arrays(json.loads(transfer.text)["held"])
            reply = read_answer(transfer.text, arrays, transfer.site, transfer.ticket)
        except ValueError as error:
            reply = _rejected(transfer.ticket, transfer.site, str(error))
        self._drawn[transfer.ticket, transfer.site] = reply
        return None

    def _failed(self, transfer: _Transfer, why: str) -> Reply | None:
        for key in transfer.under_way:
            self._by_key.pop(key, None)
        reason = why if why.startswith(f"{transfer.site}: ") else f"{transfer.site}: {why}"
        reply = Reply(transfer.site, Status.FAILED, reason=reason, ticket=transfer.ticket)
        if transfer.target is None:
            return reply
        self._drawn[transfer.ticket, transfer.site] = reply
        return None

    def _say(self, transfer: _Transfer) -> None:
        now, is_over = time.monotonic(), transfer.done >= transfer.nbytes
        if self._listen is None or transfer.nbytes < _SHOWN or (now - self._told < _PAUSE and not is_over):
            return
        self._told = now
        self._listen(
            TransferProgress(
                site=transfer.site, direction=transfer.direction, done=transfer.done, total=transfer.nbytes
            )
        )


def _accepted(answer: tuple[str, Parameters] | str, transfer: _Transfer, start: int) -> Parameters:
    """The arrays of an answer that is to the piece that was asked for.

    Raises:
        ValueError: If it is not, with what the site says.
    """
    if isinstance(answer, str):
        raise ValueError(answer)
    text, arrays = answer
    try:
        said = json.loads(text)
        if said.get("reason"):
            raise ValueError(str(said["reason"]))
        if (said["exchange"], said["site"], said["at"]) != (transfer.ticket, transfer.site, start):
            raise ValueError("another piece")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a piece must be answered with what was asked, got {text!r:.80}") from error
    return arrays


def _rejected(ticket: int, site: str, why: str) -> Reply:
    return Reply(site, Status.REJECTED, reason=f"{site}: {why}", ticket=ticket)
