"""Flower's nodes by the names of their sites: who is there, who it is, and what is said to all."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from sfl.engine.flower.messages import pack, unpack
from sfl.errors import EngineError

__all__ = ["MessageId", "Nodes", "Pause"]

_HELLO_SECONDS, _PATIENT = 10.0, 60.0  # between two looks for new nodes; that a node gets to say who it is
_POLL = (0.005, 0.05)  # seconds between two looks for replies: at first, and at most
MessageId: TypeAlias = str


class Nodes:
    """The nodes of a grid.

    Args:
        grid: From Flower's ServerApp.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._sites: dict[int, str] = {}  # by node; empty for a node that is none of ours
        self._refusals: dict[int, str] = {}
        self._asked: dict[MessageId, tuple[int, float]] = {}  # nodes that have not said who they are, and since when

    def where(self) -> dict[str, int]:
        """The node of each site that is there."""
        return {site: node for node, site in self._sites.items() if site}

    def await_sites(self, names: Sequence[str], wait: float) -> None:
        """Wait until all of these are there.

        Raises:
            EngineError: If they do not connect in time.
        """
        deadline = time.monotonic() + wait
        while True:
            self.meet()
            missing = sorted(set(names) - set(self._sites.values()))
            if not missing:
                return
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"all {len(names)} sites must connect within {wait:g} s, got {len(names) - len(missing)}; "
                    f"missing are {', '.join(missing[:5])}. Start their nodes, or plan fewer sites."
                    + "".join(f"\n  node {node}: {reason}" for node, reason in self._refusals.items())
                )
            time.sleep(_POLL[1])

    def await_any(self, count: int, wait: float) -> list[str]:
        """Wait until so many sites are there, each with a name of its own; their names, sorted.

        Raises:
            EngineError: If there are more, or not as many in time.
        """
        deadline = time.monotonic() + wait
        while True:
            self.meet()
            names = sorted(filter(None, self._sites.values()))
            if len(names) == count and len(set(names)) == count:
                return names
            if len(names) > count or time.monotonic() >= deadline:
                raise EngineError(
                    f"as many sites must be connected as num_clients={count}, each with a name of its own, got "
                    f"{len(names)}: {', '.join(names)}. Start the missing ones, set --num-clients, or name the sites."
                    + "".join(f"\n  node {node}: {reason}" for node, reason in self._refusals.items())
                )
            time.sleep(_POLL[1])

    def meet(self) -> None:
        """Ask nodes that are new for the name of their site, and forget those that have left.

        A question stays open past the time that is waited for its answer: each starts a process at its node, and on a
        busy machine asking again and again would keep all of them from answering.
        """
        nodes = set(self._grid.get_node_ids())
        self._sites = {node: site for node, site in self._sites.items() if node in nodes}
        now = time.monotonic()
        self._asked = {
            sent: (node, when) for sent, (node, when) in self._asked.items() if node in nodes and now - when < _PATIENT
        }
        new = sorted(nodes - self._sites.keys() - {node for node, _ in self._asked.values()})
        if new:
            content = pack(json.dumps({"hello": 1}), {})
            sent = self._grid.push_messages([Message(content, node, MessageType.QUERY) for node in new])
            self._asked |= {message: (node, now) for message, node in zip(sent, new, strict=True)}
        pause = Pause(_HELLO_SECONDS)
        while self._asked:
            for message in self._grid.pull_messages(list(self._asked)):
                node, _ = self._asked.pop(message.metadata.reply_to_message_id, (None, 0.0))
                if node is not None and message.has_error():  # it is asked again with the next look
                    self._refusals[node] = message.error.reason or f"error {message.error.code}"
                elif node is not None:
                    self._sites[node] = _site_name(message)
            if self._asked and not pause.wait():
                return

    def _ask(self, text: Mapping[str, int], nodes: Sequence[int], seconds: float) -> Iterator[tuple[int, Message]]:
        """Ask nodes something that is no task; what they answer in time."""
        content = pack(json.dumps(text), {})
        sent = self._grid.push_messages([Message(content, node, MessageType.QUERY) for node in nodes])
        asked, pause = dict(zip(sent, nodes, strict=True)), Pause(seconds)
        while asked:
            for message in self._grid.pull_messages(list(asked)):
                node = asked.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, message
            if asked and not pause.wait():
                return

    def dismiss(self) -> Iterator[tuple[str, str]]:
        """Tell nodes that live on to forget the run; those that refuse, and why."""
        for node, message in self._ask({"bye": 1}, list(self.where().values()), _PATIENT):
            if message.has_error():
                yield self._sites[node], message.error.reason or f"error {message.error.code}"


def _site_name(message: Message) -> str:
    """The name that a node gave; none if it is no node of ours."""
    try:
        text, _ = unpack(message.content)
        return str(json.loads(text)["site"])
    except (ValueError, KeyError, TypeError):
        return ""


class Pause:
    """Waits between two looks: longer and longer, until the time is over."""

    def __init__(self, timeout: float | None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._seconds = _POLL[0]

    def reset(self) -> None:
        """Something came: look again soon."""
        self._seconds = _POLL[0]

    def wait(self) -> bool:
        """Wait for the next look; false when the time is over."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return False
        time.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, _POLL[1])
        return True
