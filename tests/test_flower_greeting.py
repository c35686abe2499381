"""Nodes are asked who they are once, however long they take: each question starts a process at its node."""

from __future__ import annotations

import json
import time
from importlib import import_module
from typing import Any

import pytest
from flwr.common import Message  # noqa: TID251 - the engine is given what it would be given by a grid

from sfl.engine.flower import nodes
from sfl.engine.flower.messages import pack
from sfl.engine.flower.server import FlowerEngine
from sfl.errors import EngineError


@pytest.fixture(autouse=True)
def a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer Flowers ask the process which task it is before it may write a message."""
    try:
        identity: Any = import_module("flwr.supercore.task_identity").TaskIdentity
    except ModuleNotFoundError:
        return
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(identity, name, 1)


class SlowGrid:
    """A SuperLink whose nodes answer only ``late`` seconds after they were asked."""

    def __init__(self, late: float) -> None:
        self.late, self.asked = late, list[Message]()
        self.when: dict[str, float] = {}

    def get_node_ids(self) -> list[int]:
        return [11, 12]

    def push_messages(self, messages: Any) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.asked)}"
            self.asked.append(message)
            self.when[message.metadata.message_id] = time.monotonic()
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, ids: Any) -> list[Message]:
        answers = []
        for sent in list(ids):
            if time.monotonic() - self.when[sent] >= self.late:
                asked = next(message for message in self.asked if message.metadata.message_id == sent)
                site = {11: "site-1", 12: "site-2"}[asked.metadata.dst_node_id]
                answers.append(Message(pack(json.dumps({"site": site}), {}), reply_to=asked))
        return answers


def engine(grid: Any, **more: Any) -> FlowerEngine:
    return FlowerEngine(grid, ["site-1", "site-2"], **more)


def test_slow_nodes_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_HELLO_SECONDS", 0.05)
    grid = SlowGrid(late=0.4)
    assert engine(grid, wait=20.0).clients() == ["site-1", "site-2"]
    assert len(grid.asked) == 2


def test_more_nodes_than_planned_and_fewer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_HELLO_SECONDS", 0.05)
    there = nodes.Nodes(SlowGrid(late=0.0))  # pyright: ignore[reportArgumentType] - what is used of a grid
    assert there.await_any(2, wait=9.0) == ["site-1", "site-2"]
    for planned in (1, 3):
        with pytest.raises(
            EngineError, match=f"num_clients={planned}, each with a name of its own, got 2: site-1, site"
        ):
            there.await_any(planned, wait=0.05)


def test_nodes_that_do_not_answer_are_asked_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_HELLO_SECONDS", 0.02)
    monkeypatch.setattr(nodes, "_PATIENT", 0.1)
    grid = SlowGrid(late=1e9)
    with pytest.raises(EngineError, match="all 2 sites must connect"):
        engine(grid, wait=0.5)
    assert 4 <= len(grid.asked) <= 14
