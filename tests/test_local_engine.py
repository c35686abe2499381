"""The in-process engine: order, lateness, devices."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import clients
from sfl.client.site import SiteProgram
from sfl.core.task import FIT, Status, Task
from sfl.engine.local import LocalEngine

W = {"w": np.zeros(2)}
NAMES = ["site-1", "site-2", "site-3"]


def engine(client: Any, **kwargs: Any) -> LocalEngine:
    return LocalEngine(SiteProgram(client=client, kwargs=kwargs), NAMES)


def test_sites_run_in_the_order_of_the_cohort() -> None:
    local = engine(clients.Base)
    assert [r.site for r in local.exchange(Task(FIT, 1, W), ["site-3", "site-1"])] == ["site-3", "site-1"]
    assert local.clients() == NAMES
    assert local.describe() == "in-process on cpu"


def test_each_site_runs_when_its_reply_is_drawn() -> None:
    clients.Hoarder.kept.clear()
    replies = engine(clients.Hoarder).exchange(Task(FIT, 1, W), NAMES)
    for drawn in (1, 2, 3):
        next(replies)
        assert len(clients.Hoarder.kept) == drawn


def test_a_sleeping_site_and_those_behind_it_are_late_and_the_next_round_works() -> None:
    local = engine(clients.Die, mode="sleep")
    first = list(local.exchange(Task(FIT, 1, W), NAMES, 0.3))
    assert [r.status for r in first] == [Status.USED, Status.LATE, Status.LATE]
    assert first[1].reason == "site-2: later than 0.3 s"
    assert first[1].update is None
    second = list(local.exchange(Task(FIT, 2, W), NAMES, 30.0))
    assert [r.update.delta["w"].tolist() for r in second if r.update] == [[1.0, 1.0]] * 3


def test_torch_is_told_its_threads_only_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    torch = SimpleNamespace(get_num_threads=lambda: 8, set_num_threads=told.append)
    local = LocalEngine(SiteProgram(client=clients.Base), NAMES, threads=3)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    list(local.exchange(Task(FIT, 1, W), NAMES))
    assert told == []
    assert "torch" not in sys.modules
    monkeypatch.setitem(sys.modules, "torch", torch)
    list(local.exchange(Task(FIT, 2, W), ["site-1"]))
    assert told == [3]
