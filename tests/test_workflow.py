"""Workflows: broadcast, send and relay, waiting or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients
import workflows
from sfl.core.algorithm import ServerState
from sfl.core.events import Event, SiteFinished, StageStarted
from sfl.core.task import Status
from sfl.env import SimEnv
from sfl.errors import CompositionError, ConfigError, RoundError
from sfl.recipe import RunResult, WorkflowRecipe
from sfl.server.workflow import Sites, Workflow
from sfl.types import FederationConfig

ENVS = [SimEnv(device="cpu"), SimEnv(device="cpu", num_threads=2)]


def recipe(workflow: Workflow, *, rounds: int = 2, sites: int = 3, **fields: Any) -> WorkflowRecipe:
    federation = FederationConfig(num_clients=sites, num_rounds=rounds, min_available_clients=1)
    made = WorkflowRecipe(
        name="w",
        client=workflows.Steps,
        initial_parameters={"w": np.zeros(2)},
        federation=federation,
        workflow=workflow,
    )
    return replace(made, **fields)


@dataclass(frozen=True)
class Does(Workflow):
    """One round whose new parameters are what ``what`` returns."""

    what: Callable[[Sites, ServerState], Any]

    def run(self, sites: Sites, state: ServerState) -> ServerState:
        while sites.goes_on(state):
            state = sites.finish_round(state, [], self.what(sites, state))
        return state


def once(what: Callable[[Sites, ServerState], Any], env: SimEnv = ENVS[0], **fields: Any) -> RunResult:
    return recipe(Does(what), rounds=1, **fields).execute(env)


@pytest.mark.parametrize("env", ENVS)
def test_a_relay_hands_each_site_what_the_one_before_has_left(env: SimEnv) -> None:
    result = recipe(workflows.Cyclic()).execute(env)
    w = np.zeros(2)
    for _round in range(2):
        for site in (1, 2, 3):
            w = 2 * w + site
    assert result.parameters["w"].tolist() == w.tolist()
    assert [r.fit["seen"] for r in result.rounds[1:]] == [1.0, 2.0]
    assert result.rounds[2].evaluation["loss"] == w.sum()


@pytest.mark.parametrize("env", ENVS)
def test_several_tasks_under_way_come_to_the_same(env: SimEnv) -> None:
    assert recipe(workflows.Mixed()).execute(env).parameters["w"].tolist() == workflows.MIXED


def test_a_resumed_workflow_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe(workflows.Mixed(), rounds=1).execute(ENVS[0], out=tmp_path / "run")
    rest = recipe(workflows.Mixed()).execute(ENVS[1], out=tmp_path / "run", resume=True)
    assert rest.parameters["w"].tolist() == workflows.MIXED


def test_buffered_asynchrony_can_be_written_with_it() -> None:
    result = recipe(workflows.Buffered(buffer=2), rounds=4).execute(ENVS[1])
    assert result.state.round == 4
    assert all(len([s for s in r.sites if s.status is Status.USED]) >= 1 for r in result.rounds[1:])


@pytest.mark.parametrize("env", ENVS)
def test_send_asks_the_next_site_when_one_fails(env: SimEnv) -> None:
    def ask(sites: Sites, state: ServerState) -> Any:
        sent = sites.send(sites.fit_task(state), ["site-2", "site-3", "site-1"])
        replies = sent.wait()
        assert [(r.site, r.status) for r in replies] == [("site-2", Status.FAILED), ("site-3", Status.USED)]
        return sites.aggregate(replies)

    faulty = {"client": clients.Faulty, "client_kwargs": {"mode": "raise"}}
    assert once(ask, env, **faulty).parameters["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("env", ENVS)
def test_a_relay_passes_over_a_site_that_fails(env: SimEnv) -> None:
    def go(sites: Sites, state: ServerState) -> Any:
        relay = sites.relay(sites.fit_task(state))
        assert [r.status for r in relay.wait()] == [Status.USED, Status.FAILED, Status.USED]
        return relay.parameters

    faulty = {"client": clients.Faulty, "client_kwargs": {"mode": "raise"}}
    assert once(go, env, **faulty).parameters["w"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("env", ENVS)
def test_a_site_that_does_not_answer_in_time_is_late_and_reported(env: SimEnv) -> None:
    def go(sites: Sites, state: ServerState) -> Any:
        pending = sites.broadcast(sites.fit_task(state))
        statuses = {r.site: r.status for r in pending.wait(0.5)}
        assert statuses["site-1"] is Status.USED
        assert statuses["site-2"] is Status.LATE
        assert pending.done
        return state.parameters

    events: list[Event] = []
    slow = {"client": workflows.Slow, "evaluate_every": 0}
    recipe(Does(go), rounds=1, **slow).execute(env, observers=(events.append,))
    ended = {e.site: e.status for e in events if isinstance(e, SiteFinished)}
    assert ended["site-2"] is Status.LATE
    assert [e.cohort for e in events if isinstance(e, StageStarted)] == [("site-1", "site-2", "site-3")]


def test_nothing_outstanding_is_none_and_a_cancelled_task_leaves_nothing() -> None:
    def go(sites: Sites, state: ServerState) -> Any:
        assert sites.next() is None
        pending = sites.broadcast(sites.fit_task(state))
        assert not pending.done
        found = sites.next(5.0)
        assert found is not None
        assert found[0] is pending
        assert found[1].site == "site-1"
        pending.cancel()
        assert pending.done
        assert [r.status for r in pending.wait()] == [Status.USED, Status.LATE, Status.LATE]
        assert sites.next() is None
        sites.broadcast(sites.fit_task(state))  # left outstanding at the end
        return state.parameters

    once(go, evaluate_every=0)


@pytest.mark.parametrize("env", ENVS)
def test_answers_to_tasks_of_its_own_may_have_any_shape_and_are_checked(env: SimEnv) -> None:
    def go(sites: Sites, state: ServerState) -> Any:
        replies = sites.broadcast(sites.task("count", 1, {}, scale=2)).wait()
        assert [r.update.delta["rows"].tolist() for r in replies if r.update] == [[0], [2, 2], [4, 4, 4]]
        assert [r.update.weight for r in replies if r.update] == [1.0, 2.0, 3.0]
        (bad,) = sites.send(sites.task("nan", 1, {}), "site-1").wait()
        assert bad.status is Status.REJECTED
        (unknown,) = sites.send(sites.task("dance", 1, {}), "site-1").wait()
        assert "Steps.run_task must be defined to do 'dance'" in unknown.reason
        return state.parameters

    once(go, env)


def test_a_protected_site_does_no_task_of_its_own() -> None:
    def go(sites: Sites, state: ServerState) -> Any:
        (reply,) = sites.send(sites.task("count", 1, {}), "site-1").wait()
        assert "a protected job must only train and evaluate, got the task 'count'" in reply.reason
        return state.parameters

    once(go, transforms=(clients.ClipTo(1.0),))


def test_what_does_not_fit_is_refused() -> None:
    def unknown(sites: Sites, state: ServerState) -> Any:
        sites.broadcast(sites.fit_task(state), ["site-9"])

    def none(sites: Sites, state: ServerState) -> Any:
        sites.relay(sites.fit_task(state), [])

    def twice(sites: Sites, state: ServerState) -> Any:
        sites.broadcast(sites.fit_task(state), ["site-1", "site-1"])

    def few(sites: Sites, state: ServerState) -> Any:
        sites.aggregate([])

    for what in (unknown, none, twice):
        with pytest.raises(ConfigError, match="sites of a task must be distinct ones of site-1, site-2, site-3"):
            once(what)
    with pytest.raises(RoundError, match="at least 1 usable updates, got 0"):
        once(few)
    with pytest.raises(CompositionError, match="mechanisms must come with an algorithm"):
        replace(recipe(workflows.Cyclic()), mechanisms=(clients.TestMechanism("local"),)).build()
