"""Tasks and replies on a wire: what is sent arrives, and what is no reply of ours is a rejected one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sfl.core.task import Reply, Status, Task, Update
from sfl.engine.wire import pack_reply, pack_task, read_answer, unpack_reply, unpack_task
from sfl.errors import EngineError

ARRAYS = {"b": np.ones(3, np.float32), "a": np.arange(4), "c": np.array(1.5)}


def test_a_task_arrives_in_its_order() -> None:
    task = Task("fit", 3, ARRAYS, {"seed": 7, "rate": 0.1, "name": "x"})
    text, arrays = pack_task(5, task, {"site-1": 0, "site-2": 1})
    shuffled = dict(sorted(arrays.items()))
    order = unpack_task(text, shuffled, "site-2")
    assert (order.exchange, order.client_id, order.task.name, order.task.round) == (5, 1, "fit", 3)
    assert list(order.task.parameters) == ["b", "a", "c"]
    assert order.task.config == task.config


def test_a_reply_arrives_and_claims_nothing_that_was_not_checked() -> None:
    update = Update("site-1", ARRAYS, 12.0, {"loss": 0.5, "odd": float("nan")})
    reply = Reply("site-1", Status.USED, update, seconds=1.5, logs=("line",), known_finite=True)
    text, arrays = pack_reply(5, reply)
    exchange, back = unpack_reply(text, arrays, "site-1")
    assert exchange == 5
    assert back.update is not None
    assert list(back.update.delta) == list(ARRAYS)
    assert (back.update.weight, back.update.metrics["loss"], back.seconds, back.logs) == (12.0, 0.5, 1.5, ("line",))
    assert np.isnan(back.update.metrics["odd"])
    assert not back.known_finite


def test_a_failure_keeps_its_words() -> None:
    failed = Reply("site-1", Status.FAILED, reason="site-1: ValueError: x", details="Traceback")
    assert unpack_reply(*pack_reply(1, failed), "site-1") == (1, failed)


GOOD = json.loads(pack_reply(1, Reply("site-1", Status.USED, Update("site-1", ARRAYS, 1.0)))[0])


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"site": "site-2"},
        {"status": "wonderful"},
        {"update": {"weight": "many", "metrics": {}}},
        {"update": {"weight": 1.0}},
        {"update": {"weight": 1.0, "metrics": [1]}},
        {"arrays": ["a"]},
        {"arrays": ["a", "b", "z"]},
        {"exchange": None},
        {"seconds": "long"},
        {"exchange": float("inf")},
        {"update": {"weight": 10**400, "metrics": {}}},
    ],
)
def test_what_is_no_reply_is_rejected_and_says_whose(change: dict[str, object]) -> None:
    _, reply = unpack_reply(json.dumps(GOOD | change), ARRAYS, "site-1")
    assert reply.status is Status.REJECTED
    assert reply.reason.startswith("site-1: a reply must be one of ours")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "no"])
def test_rubbish_is_rejected(text: str) -> None:
    assert unpack_reply(text, {}, "s")[1].status is Status.REJECTED
    with pytest.raises(EngineError, match="s: a task must be one of ours"):
        unpack_task(text, {}, "s")


def test_a_task_of_another_version_or_another_site_is_refused() -> None:
    text, arrays = pack_task(1, Task("fit", 1, {}), {"site-1": 0})
    with pytest.raises(EngineError):
        unpack_task(text, arrays, "site-9")
    with pytest.raises(EngineError, match="format 1, got 9"):
        unpack_task(json.dumps(json.loads(text) | {"format": 9}), arrays, "site-1")


def test_an_answer_to_another_exchange_is_rejected() -> None:
    packed = pack_reply(4, Reply("site-1", Status.USED, Update("site-1", ARRAYS, 1.0)))
    assert read_answer(*packed, "site-1", 4).status is Status.USED
    late = read_answer(*packed, "site-1", 5)
    assert (late.status, late.update) == (Status.REJECTED, None)
    assert "answered exchange 4, not 5" in late.reason
