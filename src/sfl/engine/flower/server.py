"""Flower's grid as an engine: tasks are messages to nodes, and a node is known by the name of its site."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from sfl.core.events import TransferProgress
from sfl.core.task import EVALUATE, FIT, Reply, Status, Task
from sfl.engine.base import Engine
from sfl.engine.flower.messages import pack, unpack
from sfl.engine.flower.nodes import MessageId, Nodes, Pause
from sfl.engine.freight import Freight, Key, Ready
from sfl.engine.wire import pack_task, read_answer
from sfl.types import Parameters

_log = logging.getLogger(__name__)
_LOOK = 0.005  # seconds between two looks for a piece
_TYPES = {FIT: MessageType.TRAIN, EVALUATE: MessageType.EVALUATE}

WAIT = 120.0
"""Seconds that sites get to connect."""


@dataclass(frozen=True, slots=True)
class Errand:
    """A site's part of a send; ``task`` is kept only until it is pushed."""

    ticket: int
    site: str
    task: Task | None


class FlowerEngine(Engine):
    """Carries tasks over a Flower grid.

    Args:
        grid: From Flower's ServerApp.
        planned: The planned sites, in the order of their ``client_id``, or how many: then all that are connected.
        wait: Seconds to wait for all of them to connect.
        what: The engine in words.
        dismiss: Whether nodes live on after the run, and are told that it has ended.
        abreast: At how many sites large tasks are at a time; ``None`` for no limit. Where sites share processes, what
            more of them would hold would only wait.

    Raises:
        EngineError: If they do not connect in time.
    """

    def __init__(
        self,
        grid: Grid,
        planned: Sequence[str] | int,
        *,
        wait: float = WAIT,
        what: str = "Flower",
        dismiss: bool = False,
        abreast: int | None = None,
    ) -> None:
        self._grid, self._what, self._dismiss, self._abreast = grid, what, dismiss, abreast
        self._ids = {} if isinstance(planned, int) else {name: index for index, name in enumerate(planned)}
        self._nodes = Nodes(grid)
        self._last, self._life = 0, secrets.token_hex(8)
        self._open: dict[MessageId, Errand] = {}  # at their sites
        self._behind: deque[Errand] = deque()  # each waits until its site has answered what was sent before
        self._aside: list[Reply] = []  # known, and not drawn
        self._freight = Freight(self._post, self._life, self._oldest)
        if isinstance(planned, int):
            self._ids = {name: index for index, name in enumerate(self._nodes.await_any(planned, wait))}
        else:
            self._nodes.await_sites(planned, wait)

    def clients(self) -> list[str]:
        """Names of the planned sites, sorted."""
        return sorted(self._ids)

    def send(self, task: Task, clients: Sequence[str]) -> int:
        """Push one message to each site's node; a site without a node has failed."""
        self._last += 1
        self._nodes.meet()
        self._behind += [Errand(self._last, site, task) for site in clients]
        self._go_on()
        return self._last

    def _push(self, ticket: int, task: Task, sites: Sequence[str]) -> None:
        where = self._nodes.where()
        there = [site for site in sites if site in where]
        if there:
            text, arrays = pack_task(ticket, task, {site: self._ids[site] for site in there}, self._life)
            text = self._freight.text(text, task, ticket)
            if self._freight.is_large(arrays):
                failed = [self._freight.load(ticket, site, text, arrays) for site in there]
                self._aside += [reply for reply in failed if reply is not None]
            else:
                self._put(ticket, there, text, arrays)
        for site in sites:
            if site not in where:
                self._aside.append(_gone(ticket, site))

    def _put(self, ticket: int, sites: Sequence[str], text: str, arrays: Parameters) -> None:
        """Push a task as one message to each site."""
        said, where = json.loads(text), self._nodes.where()
        content, kind = pack(text, arrays), _TYPES.get(said["name"], MessageType.QUERY)
        messages = [Message(content, where[site], kind, group_id=str(said["round"])) for site in sites]
        errands = [Errand(ticket, site, None) for site in sites]
        self._open.update(zip(self._grid.push_messages(messages), errands, strict=True))

    def _post(self, site: str, text: str, arrays: Parameters) -> Key:
        """Push what carries a piece, or asks for one."""
        node = self._nodes.where().get(site)
        if node is None:
            raise ValueError("its node has left the federation")
        sent = next(iter(self._grid.push_messages([Message(pack(text, arrays), node, MessageType.QUERY)])), None)
        if sent is None:
            raise ValueError("the SuperLink took no message for it")
        return sent

    def _oldest(self) -> int:
        """The oldest ticket of which something is outstanding."""
        errands = (*self._open.values(), *self._behind)
        return min({self._last, *(errand.ticket for errand in errands), *self._freight.tickets()})

    def _go_on(self) -> None:
        """Push what waits for a site that is free now, what is the same for several sites at once."""
        busy = {errand.site for errand in self._open.values()} | self._freight.loading()
        room = len(self._behind) if self._abreast is None else self._abreast - len(busy)
        waiting = list(self._behind)
        self._behind.clear()
        free: dict[int, tuple[Task, list[str]]] = {}
        for errand in waiting:
            if errand.site in busy or errand.task is None or self._must_wait(errand, room):
                self._behind.append(errand)
            else:
                free.setdefault(errand.ticket, (errand.task, []))[1].append(errand.site)
                room -= 1
            busy.add(errand.site)
        for ticket, (task, sites) in free.items():
            self._push(ticket, task, sites)

    def _must_wait(self, errand: Errand, room: int) -> bool:
        """Whether a large task waits until those before it in its send have been drawn."""
        if self._abreast is None or errand.task is None or not self._freight.is_large(errand.task.parameters):
            return False
        return room <= self._freight.undrawn(errand.ticket)

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        """Replies as they arrive."""
        for reply in self.incoming(timeout, ticket=ticket):
            yield self.drawn(reply, timeout)

    def incoming(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        """See ``Engine.incoming``."""
        pause = Pause(timeout)
        while True:
            at = next((at for at, reply in enumerate(self._aside) if ticket in (None, reply.ticket)), None)
            if at is not None:
                reply = self._aside.pop(at)
                in_time = self._abreast is not None and timeout is not None  # sites behind it must not be late for it
                yield self.drawn(reply, timeout) if in_time else reply
                continue
            outstanding = (*self._open.values(), *self._behind)
            if all(ticket not in (None, errand.ticket) for errand in outstanding) and not self._freight.loads(ticket):
                return
            if self._pull():
                pause.reset()
                self._go_on()
            elif not pause.wait():
                return

    def drawn(self, reply: Reply, timeout: float | None = None) -> Reply:
        """See ``Engine.drawn``."""
        whole = self._freight.whole(reply, self._pump, timeout)
        self._go_on()
        return whole

    def watch(self, listener: Callable[[TransferProgress], object]) -> None:
        """See ``Engine.watch``."""
        self._freight.tell(listener)

    def _pump(self) -> bool:
        if self._pull():
            return True
        time.sleep(_LOOK)
        return False

    def _pull(self) -> bool:
        """Put what has come aside; whether that is anything."""
        messages = list(self._grid.pull_messages([*self._open, *map(str, self._freight.keys)]))
        found = bool(messages)
        while messages:
            message = messages.pop()
            sent = message.metadata.reply_to_message_id
            errand = self._open.pop(sent, None)
            if errand is not None:
                self._aside.append(self._arrived(errand, message))
                continue
            follows = self._freight.came(sent, _content(message))
            if isinstance(follows, Ready) and follows.site in self._nodes.where():
                self._put(follows.ticket, [follows.site], follows.text, {})
            elif isinstance(follows, Ready):
                self._aside.append(_gone(follows.ticket, follows.site))
            elif follows is not None:
                self._aside.append(follows)
        return found

    def _arrived(self, errand: Errand, message: Message) -> Reply:
        site, content = errand.site, _content(message)
        if isinstance(content, str):
            status = Status.FAILED if message.has_error() else Status.REJECTED
            return Reply(site, status, reason=f"{site}: {content}", ticket=errand.ticket)
        noted = self._freight.noted(errand.ticket, site, content[0])
        return noted or replace(read_answer(*content, site, errand.ticket), ticket=errand.ticket)

    def cancel(self, ticket: int) -> None:
        """Forget what is outstanding of a ticket; a node at work finishes for nobody."""
        self._open = {sent: errand for sent, errand in self._open.items() if errand.ticket != ticket}
        self._behind = deque(errand for errand in self._behind if errand.ticket != ticket)
        self._aside = [reply for reply in self._aside if reply.ticket != ticket]
        self._freight.cancel(ticket)
        self._go_on()

    def close(self) -> None:
        """Let nodes that live on forget the run."""
        if self._dismiss:
            self._dismiss = False
            for site, reason in self._nodes.dismiss():
                _log.warning("%s keeps the run's process: %s", site, reason)

    def describe(self) -> str:
        """The engine in words."""
        return self._what


def _gone(ticket: int, site: str) -> Reply:
    return Reply(site, Status.FAILED, reason=f"{site}: its node has left the federation", ticket=ticket)


def _content(message: Message) -> tuple[str, Parameters] | str:
    """The text and the arrays of a message, or why there are none."""
    if message.has_error():
        return message.error.reason or f"error {message.error.code}"
    try:
        return unpack(message.content)
    except ValueError as error:
        return str(error)
